"""The cells of the notebooks, in their order, in one process, on the tiny model."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
MODEL = 'MODEL = "smollm2-135m"'


def code_of(notebook: Path) -> str:
    """All of its code."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_there_is_a_notebook() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    notebook: Path,
    start: Callable[..., subprocess.Popen[str]],
    tied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    code = code_of(notebook)
    assert code.count(MODEL) == 1
    process = start(tmp_path, program=("-c", code.replace(MODEL, f"MODEL = {str(tied)!r}")))
    printed, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    results = json.loads((tmp_path / "artifacts" / "quickstart" / "results.json").read_text())
    assert f"perplexity {results['evaluation']['perplexity']:.1f}, " in printed
    assert "report.html\n" in printed
    assert printed.partition("The capital of France is")[2].strip()  # What the model makes of it.


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_names_no_folder_of_its_author_and_is_small(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    assert not any(f"/{root}/" in text for root in ("home", "work", "Users", "root", "tmp"))
    assert len(text) < 500_000
