"""The scripts for a machine with a GPU run here too, on tiny shapes."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_gpu(start: Callable[..., Popen[str]], tmp_path: Path) -> None:
    checks = ["--dry-run", "--checks", "70b", "cayley", "hadamard"]
    process = start(tmp_path, *checks, program=(str(BENCHMARKS / "gpu.py"),))
    output, error = process.communicate()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["not run"] == {}, output + error
    lines = {line["check"]: line for line in report["lines"]}
    stages = [f"70B, foreseen: {stage}" for stage in ("capture", "learn", "fuse", "quantize")]
    assert all(lines[stage]["measured"] > 0 for stage in stages)
    whole = lines["70B, foreseen: capture, learn, fuse"]
    assert whole["measured"] == pytest.approx(sum(lines[stage]["measured"] for stage in stages[:3]))
    assert (whole["asked"], whole["unit"]) == (600, "s")
    assert lines["largest entry of R^T R - I after 12 steps"]["measured"] < 1e-5
    assert lines["Hadamard of 96: KurTail"]["measured"] > 0


def test_gpu_kernels(start: Callable[..., Popen[str]], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    program = (str(BENCHMARKS / "gpu_kernels.py"),)
    process = start(tmp_path, "--cpu-dry-run", "--out", "gpu.json", program=program)
    output, error = process.communicate()
    assert process.returncode == 0, output + error
    assert [line.partition(",")[0] for line in output.splitlines() if line.endswith(" s")] == [
        "gemm: as the mirror",
        "cache: as the mirror",
        "times: done",
    ]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry run"]
    (linear,) = report["gemm"]["linears"].values()
    assert linear["codes"] == 64 * 384
    assert 0.1 < linear["output error over bound"] <= 1
    assert report["cache"]["heads of 64, bfloat16"]["values"] == 16 * 8 * 64


def test_gpu_kernels_without_a_gpu(start: Callable[..., Popen[str]], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("has one")
    process = start(tmp_path, "--parts", "cache", program=(str(BENCHMARKS / "gpu_kernels.py"),))
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output == "no GPU here; --cpu-dry-run runs what needs none\n"


def test_gpu_kernels_that_compute_something_else_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gemm, humming, cache = (importlib.import_module(f"gpu_{name}") for name in ("gemm", "humming", "cache"))

    class Eighths(humming.Emulated):  # type: ignore[name-defined, misc]
        """Its largest code is -8's."""

        def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
            codes, scale = super().quantized(x * 7 / 8)
            return codes, scale

    class Late(humming.Emulated):  # type: ignore[name-defined, misc]
        """An output is the next one's."""

        def whole(self, x: Tensor) -> Tensor:
            return super().whole(x).roll(1, dims=-1)

    class Swapped(cache.Emulated):  # type: ignore[name-defined, misc]
        """Halves of bytes the other way round."""

        def written(self, turned: Tensor) -> tuple[Tensor, Tensor]:
            stored, scale = super().written(turned)
            return stored >> 4 | stored << 4, scale

    folder = gemm.random_folder(tmp_path / "layer", 64, 128, torch.float16)
    wrong = [what.partition(": ")[2].split(maxsplit=1)[1] for what in gemm.compare(folder, Eighths, "cpu")["failures"]]
    assert wrong[:2] == ["codes unlike the rule in float32", "scales unlike"]
    (outputs,) = gemm.compare(folder, Late, "cpu")["failures"]
    assert "outputs are further" in outputs
    assert any("codes are not the mirror's" in what for what in cache.compare(Swapped(), (64,), 16)["failures"])
    assert humming.halves(torch.tensor([0x7F, 0x80, 0x18], dtype=torch.uint8)).tolist() == [-1, 7, 0, -8, -8, 1]
