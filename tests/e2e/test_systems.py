"""`kurtail compare` with several recipes after one `--config`: a row for each, refusals told before any work."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import read_page

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
SHORT = "fusion: {scales: {parts: [values], text: {windows: 2, seqlen: 32}}}\n"


def arguments(recipe: Path, *systems: str) -> list[str]:
    return ["compare", "--config", str(recipe), "--config", *systems, "--out", "table"]


def table_of(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "table" / "compare.json").read_text())
    return found


def stamps(place: Path) -> dict[Path, int]:
    """When each file was written that an artefact, a store or rotations are made of."""
    kinds = ("*.safetensors", "kurtail.json", "results.json")
    folders = place / "artifacts", place / "runs"
    return {p: p.stat().st_mtime_ns for folder in folders for kind in kinds for p in folder.rglob(kind)}


def test_rows_have_the_names_of_their_recipes_and_refusals_are_told(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that nobody knows has a row of its own, too."""
    place = recipe.parent
    (place / "mine.yaml").write_text("# Mine.\nmodel: {class_path: kurtail_pl.lit.FixedRotations}\n" + SHORT)
    kurtail(place, *arguments(recipe, "rtn", "mine.yaml", "qoq", "llama-cpp", "gptq"))
    table, printed = table_of(place), capsys.readouterr()
    lines = {line["name"]: line for line in table["lines"]}
    assert {name: (line["rotations"], line["weights"]) for name, line in lines.items()} == {
        "float": ("none", "-"),
        "rtn": ("kurtail", "rtn"),
        "mine": ("quarot", "gptq"),
        "gptq": ("kurtail", "gptq"),
    }
    values = {name: line["values"][0] for name, line in lines.items()}
    assert len({each["perplexity"] for each in values.values()}) == 4
    assert list(table["refused"]) == ["qoq", "llama-cpp"]
    for name, reason in table["refused"].items():
        assert f"refused: {name}: {reason}" in printed.err.split("capture:")[0]
        assert f"- {name}: {reason}" in printed.out
        assert "group_size" in reason
    assert (place / "table" / "compare.md").read_text().startswith("# tied\n")
    (refusals,) = (each for each in read_page(place / "table").tables["Methods"] if each[0][0].strip() == "refused")
    assert refusals[1:] == [list(pair) for pair in table["refused"].items()]

    # What systems share is made once: the activations, and the rotations of both ways to round.
    assert len(list(place.rglob("manifest.json"))) == 1
    assert values["rtn"]["learn_seconds"] == values["gptq"]["learn_seconds"]
    # Whoever learned from the activations has their cost.
    captured = json.loads((place / "runs" / "store" / "cost.json").read_text())
    costs = {path.parent.name: json.loads(path.read_text())["cost"] for path in place.glob("artifacts/*/results.json")}
    found = {name: cost.get("capture") for name, cost in costs.items()}
    assert found == {name: captured if "kurtail" in name else None for name in costs}
    making = [
        sum(spent["cpu_seconds"] for stage, spent in cost.items() if stage != "evaluate") for cost in costs.values()
    ]
    assert sorted(making) == sorted(each["cpu_seconds"] for each in values.values())

    # In a table of their own the numbers are the same, and nothing is made.
    before = stamps(place)
    kurtail(place, *arguments(recipe, "mine.yaml", "gptq"))
    assert stamps(place) == before
    again = {line["name"]: line["values"] for line in table_of(place)["lines"]}
    assert again == {name: lines[name]["values"] for name in ("float", "mine", "gptq")}


def test_where_nothing_can_be_made_nothing_is(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = recipe.parent
    (place / "odd.yaml").write_text("quantization: {rounder: {class_path: GPTQ, init_args: {percdump: 1}}}\n")
    other = "evaluation: {text: {windows: 1}}\n"
    (place / "other.yaml").write_text(other)
    for systems, said in (
        (["qoq", "odd.yaml"], "qoq: weights.group_size is 64"),
        (["rtn", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["rtn", "rtn"], "two systems are called rtn"),
    ):
        with pytest.raises(SystemExit):
            kurtail(place, *arguments(recipe, *systems))
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        kurtail(place, *arguments(recipe, "rtn", "gptq"), "--with", "quarot")
    assert "--with stands beside a --config of several recipes" in capsys.readouterr().err
    assert not any((place / folder).exists() for folder in ("runs", "artifacts"))


def test_killed_it_goes_on(
    kurtail: Kurtail, start: Callable[..., subprocess.Popen[str]], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished before stays; what was not is made."""
    place, command = recipe.parent, arguments(recipe, "quarot", "unrotated")
    process = start(place, *command)
    deadline = time.monotonic() + 300
    while not list(place.glob("artifacts/*/results.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (place / "table" / "compare.json").exists()
    finished = {path.parent for path in place.glob("artifacts/*/results.json")}
    before = {path: path.stat().st_mtime_ns for folder in finished for path in folder.glob("*.safetensors")}
    kurtail(place, *command)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lines = table_of(place)["lines"]
    assert [line["name"] for line in lines] == ["float", "quarot", "unrotated"]
