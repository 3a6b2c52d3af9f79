"""Tasks by the real commands: `eval` on several models, killed and run again; in a recipe; beside perplexity."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from task_rows import ROWS

from kurtail_pl.storage.resume import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]


@pytest.fixture
def artefact(kurtail: Kurtail, tied: Path, tmp_path: Path) -> Path:
    """4 bits everywhere, rounded to nearest."""
    kurtail(tmp_path, "fuse", "--model", tied, "--method", "quarot", "--out", "fused")
    kurtail(tmp_path, "quantize", "--artefact", "fused", "--out", "own", "--spec.rounder", "RTN")
    return tmp_path / "own"


def cells(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_several_models_in_one_command(
    kurtail: Kurtail, tied: Path, artefact: Path, task_rows: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in tied.iterdir()}
    arguments = ["--tasks.folder", task_rows, "--tasks.limit", 5, "--tasks.mmlu_shots", 1]
    kurtail(artefact.parent, "eval", "--model", tied, "--model", "own", *arguments)
    printed = capsys.readouterr().out
    assert "perplexity" not in printed
    table = cells(printed)
    assert table[0][5:] == ["tied", "own"]
    found = json.loads((artefact / "results.json").read_text())["tasks"]
    for line in table[2:]:
        if line[0] in found["tasks"]:
            task = found["tasks"][line[0]]
            assert line[4] == str(task["rows"]) == "5"
            assert line[6] == f"{100 * task['value']:.1f} ± {100 * task['stderr']:.1f}"
    assert len(found["tasks"]) == 10
    assert {path.name for path in tied.iterdir()} == before
    assert list((cache / "work").iterdir()) == []


def test_perplexity_and_tasks_keep_each_other(
    kurtail: Kurtail, tied: Path, artefact: Path, task_rows: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = artefact.parent
    tasks = ["--tasks.names", "piqa,boolq", "--tasks.folder", task_rows]
    text = ["--text.source", text_file, "--text.windows", 2, "--text.seqlen", 64]
    kurtail(place, "eval", "--model", "own", *tasks)
    alone = json.loads((artefact / "results.json").read_text())
    assert list(alone) == ["tasks"]
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "report", "--artefact", "own")
    assert "no perplexity yet" in capsys.readouterr().err
    capture = ["--spec.model", tied, "--spec.rows", 64, "--spec.text.source", text_file]
    kurtail(place, "capture", *capture, "--spec.text.windows", 2, "--spec.text.seqlen", 64, "--out", "store")
    kurtail(place, "eval", "--model", "own", *text, "--store", "store", "--validation_rows", 32)
    both = json.loads((artefact / "results.json").read_text())
    assert both["tasks"] == alone["tasks"]
    kurtail(place, "eval", "--model", "own", *tasks, "--tasks.limit", 3)
    again = json.loads((artefact / "results.json").read_text())
    assert {**again, "tasks": None} == {**both, "tasks": None}
    assert again["tasks"]["tasks"]["piqa"]["rows"] == 3
    kurtail(place, "report", "--artefact", "own")
    for page in ("report.md", "README.md"):
        names = [line[0] for line in cells((artefact / page).read_text())]
        assert names[-2:] == ["boolq", "piqa"]


def test_a_recipe_with_tasks(kurtail: Kurtail, recipe: Path, task_rows: Path, tmp_path: Path) -> None:
    settings = {"folder": str(task_rows), "names": ["arc_easy", "mmlu"], "mmlu_shots": 1}
    _ask(recipe, settings)
    kurtail(tmp_path, "fit", "--config", recipe)
    folder = tmp_path / "artifacts" / "tied-kurtail-w4a4kv4"
    found = json.loads((folder / "results.json").read_text())
    assert found["tasks"]["tasks"]["arc_easy"]["rows"] == ROWS
    assert found["tasks"]["mmlu"] == found["tasks"]["tasks"]["mmlu"]["acc"]
    assert "evaluation" in found
    assert "| arc_easy" in (folder / "report.md").read_text()
    assert "lm-evaluation-harness" in (folder / "README.md").read_text()


def test_a_recipe_without_its_rows_is_refused_before_training(
    kurtail: Kurtail, recipe: Path, task_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shutil.copytree(task_rows, tmp_path / "rows")
    shutil.rmtree(rows / "mathqa")
    _ask(recipe, {"folder": str(rows), "names": ["mathqa"]})
    with pytest.raises(SystemExit, match="1"):
        kurtail(tmp_path, "fit", "--config", recipe)
    assert "mathqa: no file" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()


def _ask(recipe: Path, settings: dict[str, Any]) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["evaluation"]["tasks"] = settings
    recipe.write_text(yaml.safe_dump(content))


def test_killed_and_run_again(
    start: Callable[..., subprocess.Popen[str]], kurtail: Kurtail, artefact: Path, task_rows: Path, cache: Path
) -> None:
    """By SIGKILL, once the first tasks are finished."""
    arguments = ("eval", "--model", artefact, "--tasks.folder", task_rows)
    results = artefact / "results.json"
    kurtail(artefact.parent, *arguments)
    undisturbed = json.loads(results.read_text())["tasks"]
    results.unlink()
    process = start(artefact.parent, *arguments)
    deadline = time.monotonic() + 120
    while not list(cache.glob("work/*/unfinished/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not results.exists()
    records = [json.loads(path.read_text()) for path in cache.glob("work/*/unfinished/progress.json")]
    (done,) = [record["done"] for record in records if "scores" in record["state"]]
    assert 1 <= done < 9 + 4
    kurtail(artefact.parent, *arguments)
    again = json.loads(results.read_text())["tasks"]
    assert differences({**again, "cost": None}, {**undisturbed, "cost": None}) == []
    assert list((cache / "work").iterdir()) == []


def test_without_tasks_the_harness_is_not_imported(start: Callable[..., subprocess.Popen[str]], tied: Path) -> None:
    program = (
        "import sys; from kurtail_pl.cli.main import main\n"
        f"main(['eval', '--model', {str(tied)!r}, '--text.windows', '1', '--text.seqlen', '16'])\n"
        "assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    )
    process = start(tied, program=("-c", program))
    printed, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert printed.startswith("perplexity ")
