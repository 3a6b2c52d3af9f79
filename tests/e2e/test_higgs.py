"""The road with weights on normal grids: fitted, loaded back, compared with other roundings, refused by the export."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import kurtail_pl

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]


def test_higgs_beside_gptq(kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = recipe.parent
    kurtail(place, "compare", "--config", recipe, "--with", "methods/higgs")
    lines = json.loads((place / "comparisons" / "recipe" / "compare.json").read_text())["lines"]
    assert [(line["method"], line["bits"], line["weights"]) for line in lines] == [
        ("float", "w16a16kv16", "-"), ("rtn", "w4a4kv4", "rtn"), ("gptq", "w4a4kv4", "gptq"),
        ("quarot", "w4a4kv4", "gptq"), ("kurtail", "w4a4kv4", "gptq"),
        ("kurtail", "w4a4kv4", "higgs-rtn"),
    ]  # fmt: skip
    assert "| higgs-rtn" in capsys.readouterr().out
    (folder,) = (place / "artifacts").glob("tied-kurtail-w4a4kv4-*")  # The recipe's own name is GPTQ's.
    model = kurtail_pl.load(folder)
    assert model.model.layers[0].mlp.up_proj.codes.dtype == torch.uint8
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "export", "--artefact", folder, "--out", "onnx")
    assert "levels of the normal distribution" in capsys.readouterr().err
    assert not (place / "onnx").exists()


def test_a_recipe_with_bits_by_layer_has_baselines_without(kurtail: Kurtail, recipe: Path) -> None:
    """Weights that stay float have no use for the bits of the layers; any other way to round them has."""
    by_layer = ["--quantization.scheme.layer_bits", "[2, 3, 4, 5]"]
    kurtail(recipe.parent, "compare", "--config", recipe, *by_layer, "--weights", "float", "rtn", "methods/higgs")
    lines = json.loads((recipe.parent / "comparisons" / "recipe" / "compare.json").read_text())["lines"]
    assert {(line["method"], line["bits"], line["weights"]) for line in lines if line["method"] == "kurtail"} == {
        ("kurtail", "w16a4kv4", "-"), ("kurtail", "w3.5a4kv4", "rtn"),
        ("kurtail", "w3.5a4kv4", "higgs-rtn"),
    }  # fmt: skip


def test_bits_by_layer_are_measured_named_and_planned(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    bits = {"class_path": "kurtail_pl.methods.SensitiveBits", "init_args": {"average": 3.3}}
    settings["quantization"] |= {"bits": bits, "out": None}
    settings["quantization"]["scheme"]["weights"] = {"class_path": "kurtail_pl.methods.Normal"}
    settings["quantization"]["rounder"] = {"class_path": "kurtail_pl.methods.RTN"}
    recipe.write_text(yaml.safe_dump(settings))
    kurtail(recipe.parent, "plan", "--config", recipe)
    assert "quantize" in capsys.readouterr().out
    kurtail(recipe.parent, "fit", "--config", recipe)
    (folder,) = (recipe.parent / "artifacts").iterdir()
    assert folder.name.startswith("tied-kurtail-w3.3a4kv4-")
    card = json.loads((folder / "kurtail.json").read_text())
    assert len(card["sensitivities"]) == 4
    assert sum(card["scheme"]["layer_bits"]) <= 13
    assert "bits on average: layer by layer" in (folder / "README.md").read_text()
