"""`kurtail compare`: several recipes, roundings and seeds, each learned once, all in one table, and again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]


def spinquant(recipe: Path) -> str:
    """An overlay that puts SpinQuant in KurTail's place."""
    optimizer = {"class_path": "kurtail_pl.optim.CayleySGD", "init_args": {"lr": 0.2, "momentum": 0.0}}
    source = yaml.safe_load(recipe.read_text())["data"]["init_args"]["capture"]["text"]["source"]
    text = {"source": source, "windows": 4, "seqlen": 32}
    settings = {
        "model": {"class_path": "kurtail_pl.lit.SpinQuantModule", "init_args": {"optimizer": optimizer}},
        "data": {
            "class_path": "kurtail_pl.lit.WindowDataModule",
            "init_args": {"steps": 2, "batch_windows": 2, "text": text},
        },
    }
    path = recipe.with_name("spinquant.yaml")
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path.name


def compared(place: Path) -> dict[str, Any]:
    """What the table was made of."""
    found: dict[str, Any] = json.loads((place / "comparisons" / "recipe" / "compare.json").read_text())
    return found


def artefact(place: Path, name: str, seed: int) -> Path:
    """The folder of the table whose name begins so."""
    (folder,) = (
        place / made["folder"]
        for made in compared(place)["folders"]
        if Path(made["folder"]).name.startswith(name) and made["seed"] == seed
    )
    return folder


def test_methods_roundings_and_seeds_in_one_table(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = recipe.parent
    arguments = ["compare", "--config", recipe, "--with", spinquant(recipe)]
    arguments += ["--weights", "float", "rtn", "--seeds", 0, 1]
    kurtail(place, *arguments)
    printed = capsys.readouterr()
    lines = compared(place)["lines"]
    assert [(line["method"], line["bits"], line["weights"], line["seeds"]) for line in lines] == [
        ("float", "w16a16kv16", "-", [0]),
        *[
            (method, bits, weights, [0] if method in ("none", "rtn") else [0, 1])
            for bits, weights, unrotated in (("w16a4kv4", "-", "none"), ("w4a4kv4", "rtn", "rtn"))
            for method in (unrotated, "quarot", "kurtail", "spinquant")
        ],
    ]
    assert all(len({v["perplexity"] for v in line["values"]}) == len(line["seeds"]) for line in lines)
    # Both roundings of a seed come from rotations that were learned once: five steps of KurTail, two of SpinQuant.
    for method in ("kurtail", "spinquant"):
        costs = {
            line["bits"]: [v["learn_seconds"] for v in line["values"]] for line in lines if line["method"] == method
        }
        assert costs["w16a4kv4"] == costs["w4a4kv4"]
    # The recipe names a run folder, which is KurTail's of the first seed.
    runs = [place / "runs", *(run for m in ("kurtail", "spinquant") for run in (place / "runs/tied").glob(f"{m}-*"))]
    assert [run.name.split("-")[0] for run in runs] == ["runs", "kurtail", "spinquant", "spinquant"]
    rotations = [load_file(run / "rotations.safetensors")["residual"] for run in runs]
    assert all(not torch.equal(a, b) for i, a in enumerate(rotations) for b in rotations[:i])
    card = json.loads((artefact(place, "tied-spinquant-w16a4kv4", seed=0) / "kurtail.json").read_text())
    assert card["method"] == card["rotations"]["method"] == "spinquant"
    assert (card["rotations"]["steps"], card["rotations"]["data"]["batch_windows"]) == (2, 2)
    assert (place / "comparisons" / "recipe" / "compare.md").read_text().endswith(printed.out.rstrip("\n") + "\n")

    # Again: nothing is made, and what was interrupted is made alone, be it a page of an artefact that was measured.
    lost = artefact(place, "tied-kurtail-w4a4kv4", seed=1)
    (lost / "results.json").unlink()
    unwritten = artefact(place, "tied-quarot-w4a4kv4", seed=0) / "README.md"
    page = unwritten.read_text()
    unwritten.unlink()
    before = {path: path.stat().st_mtime_ns for path in (place / "artifacts").rglob("*.json")}
    kurtail(place, *arguments)
    after = {path: path.stat().st_mtime_ns for path in (place / "artifacts").rglob("*.json")}
    assert {path for path in after if after[path] != before.get(path)} == {
        lost / "results.json",
        lost / "figures" / "figures.json",
    }
    assert unwritten.read_text() == page
    again = compared(place)["lines"]
    assert [[v["perplexity"] for v in line["values"]] for line in again] == [
        [v["perplexity"] for v in line["values"]] for line in lines
    ]


def test_a_missing_recipe_is_named(kurtail: Kurtail, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kurtail(tmp_path, "compare", "--config", "nowhere.yaml")
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def artefacts_of(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (place / "artifacts").rglob("*") if path.is_file()}


def test_what_was_made_of_another_text_is_neither_reused_nor_lost(
    kurtail: Kurtail, recipe: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of the calibration text has another content under the same name."""
    place, text, other = recipe.parent, recipe.with_name("calibration.txt"), recipe.with_name("gptq.txt")
    settings = yaml.safe_load(recipe.read_text())
    for part, file in ((settings["data"]["init_args"]["capture"], text), (settings["quantization"], other)):
        file.write_text(text_file.read_text())
        part["text"]["source"] = str(file)
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = ["compare", "--config", recipe, "--weights", "gptq"]
    kurtail(place, *arguments)
    before = artefacts_of(place)
    text.write_text(text_file.read_text().swapcase())
    for overwrite, named in (([], "another learned_from.activations.text"), (["--overwrite"], "another text")):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1"):
            kurtail(place, *arguments, *overwrite)
        assert named in capsys.readouterr().err
        assert artefacts_of(place) == before
    # Only the text of GPTQ: whatever was learned stands, and the artefacts are made anew when that is asked for.
    text.write_text(text_file.read_text())
    other.write_text(text_file.read_text().swapcase())
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, *arguments)
    assert "another calibration text" in capsys.readouterr().err
    assert artefacts_of(place) == before
    kurtail(place, *arguments, "--overwrite")
    changed = {path.parent for path, data in artefacts_of(place).items() if before.get(path) != data}
    made = {artefact(place, f"tied-{method}-w4a4kv4", seed=0) for method in ("gptq", "quarot", "kurtail")}
    assert made <= changed
    assert {path.parent for path in before} == {path.parent for path in artefacts_of(place)}
