"""The commands of the README and of the guides, in their order, on a tiny model and with short texts."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    (r"(--\S*model) smollm2-135m", r"\1 models/smollm2-135m"),
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


def cut(folder: Path, model: Path) -> None:
    """The model, and a recipe that names it."""
    shutil.copytree(model, folder / "models" / "smollm2-135m")
    model_of = {"data": {"init_args": {"capture": {"model": "models/smollm2-135m"}}}}
    (folder / "cut.yaml").write_text(json.dumps(model_of))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
@pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated")
def test_the_readmes_commands_work_in_its_order(
    kurtail: Callable[..., None],
    start: Callable[..., subprocess.Popen[str]],
    tied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut(tmp_path, tied)
    printed: dict[str, str] = {}
    done: list[list[str]] = []
    for language, block in blocks():
        if language == "python":
            short = block.replace('"kurtail-plus"', '"smoke"').replace('"smollm2-135m"', '"models/smollm2-135m"')
            process = start(tmp_path, short, program=("-c",))
            printed["python"], messages = process.communicate(timeout=900)
            assert process.returncode == 0, messages
        else:
            for arguments in commands(block):
                if arguments not in done:
                    kurtail(tmp_path, *arguments)
                    printed[arguments[0]] = capsys.readouterr().out
                    done.append(arguments)

    stages = {"capture", "fuse", "quantize", "eval", "report", "figures"}
    assert set(printed) >= {"fit", "compare", "demo", "plan", "python", *stages, "export", "generate"}
    for method in ("float", "rtn", "gptq", "quarot", "kurtail"):
        assert f"| {method} " in printed["report"]
    prompt = "The capital of France is"
    assert len(printed["python"][printed["python"].index(prompt) :].strip()) > len(prompt) + 10
    promised = {"config.json", "rotations.safetensors", "tokenizer.json", "kurtail.json", "results.json", "report.md"}
    promised |= {"report.html", "training.json"}
    artefact = tmp_path / "artifacts" / "smoke"
    assert promised <= {path.name for path in artefact.iterdir()}
    assert not (tmp_path / "runs" / "steps" / "store").exists()  # capture was a dry run
