"""Recipes that come along: each planned as it stands, and many run on a tiny model of their family."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentences
from e2e.conftest import by_kind, merged
from families import tiny_family
from transformers import AutoTokenizer

from kurtail_pl.cli.recipes import recipe_file, shipped
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.storage.card import read_card, scheme_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]
FAMILIES = {"phi-3-mini": "phi3", "mixtral-8x7b": "mixtral"}
"""Of models that are no Llama."""
PAPER = [
    *(
        f"{model} kurtail-protocol paper/tasks"
        for model in ("llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.2-1b", "llama-3.2-3b", "phi-3-mini")
    ),
    *(f"{model} kurtail-protocol large-models paper/tasks" for model in ("llama-2-70b", "llama-3-70b")),
    "mixtral-8x7b kurtail-protocol large-models rtn paper/tasks",
    "llama-3-8b kurtail-protocol rtn paper/tasks",
    "llama-3-70b kurtail-protocol large-models rtn paper/tasks",
]
"""Rows of the paper's tables."""
OVERLAYS = {"protocols": "", "methods": "", "bits": "kurtail-plus ", "ablation": "kurtail-plus "}
OWN = {
    "ablation/trained-clips": "", "ablation/orthogonal-transforms": "flatquant ",
    "ablation/learned-blocks": "mr-gptq-nvfp4 ", "bits/w4a4-mxfp4": "", "bits/w4a4-nvfp4": "",
}  # fmt: skip
"""Recipes of these folders go over others; these go over a method of their own."""
PLANNED = [
    *PAPER,
    *(f"{OWN.get(name, OVERLAYS[name.split('/')[0]])}{name}" for name in shipped() if name.split("/")[0] in OVERLAYS),
]
RUN = {
    "kurtail-protocol": "kurtail",
    "quarot-protocol": "quarot",
    "spinquant-protocol": "spinquant",
    "flatquant-protocol": "kurtail",
    "dartquant-protocol": "kurtail",
    "llama-3-8b kurtail-protocol paper/tasks": "kurtail",
    "llama-3-8b kurtail-protocol rtn paper/tasks": "kurtail",
    "llama-3-8b kurtail-protocol spinquant": "spinquant",
    "phi-3-mini kurtail-protocol paper/tasks": "kurtail",
    "mixtral-8x7b kurtail-protocol large-models rtn paper/tasks": "kurtail",
    "kurtail-protocol calibration-combined": "kurtail",
    "wikitext kurtail-plus": "kurtail-plus",
}
"""Recipes, and the method of their artefacts."""


def flags(recipes: str) -> list[str]:
    return [part for name in recipes.split() for part in ("--config", name)]


def family_of(recipes: str) -> str:
    return FAMILIES.get(recipes.split()[0], "llama3")


@pytest.fixture(scope="session")
def models(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by their family, each with a tokenizer."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            tiny_family(family).save_pretrained(made[family])
            AutoTokenizer.from_pretrained(tied).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for KURTAIL_TEXT that has all four texts."""
    root = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("wikitext", "c4", "ptb", "alpaca")):
        (root / name).mkdir()
        for split, count in {"train": 120, "test": 40}.items():
            (root / name / f"{split}.txt").write_text(" ".join(sentences(count, seed=10 * number + count)))
    return root


def settings_of(*recipes: Path) -> dict[str, Any]:
    """All settings of recipes, one over the other."""
    settings: dict[str, Any] = {}
    for path in (recipe_file("base"), *recipes):
        settings = merged(settings, yaml.safe_load(path.read_text()))
    return settings


def tiny(settings: dict[str, Any], model: Path) -> dict[str, Any]:
    """What goes over a recipe for a tiny model: few short windows, few rows and steps; whole texts stay whole."""
    text = {"windows": 4, "seqlen": 48}
    data = {"capture": {"model": str(model), "text": text, "rows": 120}, "steps": 2, "validation_rows": 40}
    by_window = settings["data"]["class_path"].endswith("WindowDataModule")
    data |= {"text": text, "batch_windows": 2} if by_window else {"batch_rows": 32}
    whole = settings["evaluation"]["text"]["windows"] is None
    group_size = settings["quantization"]["scheme"]["weights"]["init_args"]["group_size"] and 4
    return {
        "data": {"init_args": data},
        "fusion": {"scales": settings["fusion"]["scales"] and {"text": text}},
        "figures": {"layers": []},
        "quantization": {"text": text, "scheme": {"weights": {"init_args": {"group_size": group_size}}}},
        "evaluation": {"text": {**text, "windows": None if whole else 4}, "tasks": None},
    }


@pytest.mark.parametrize("recipes", PLANNED)
def test_a_plan_needs_neither_weights_nor_text(
    recipes: str,
    kurtail: Kurtail,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KURTAIL_TEXT", str(tmp_path / "nowhere"))
    config = tmp_path / "config"
    config.mkdir()
    small = json.loads((models(family_of(recipes)) / "config.json").read_text())
    # Of widths that all groups divide.
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    given = {} if family_of(recipes) == "phi3" else wide
    (config / "config.json").write_text(json.dumps({**small, **given, "max_position_embeddings": 8192}))
    kurtail(tmp_path, "plan", *flags(recipes), "--data.init_args.capture.model", config)
    stages = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert stages == ["stage", "--------", "capture", "learn", "fuse", "quantize", "evaluate"]


@pytest.mark.parametrize("recipes", RUN)
def test_a_recipe_runs(
    recipes: str,
    kurtail: Kurtail,
    models: Callable[[str], Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From texts by name to results on the whole of WikiText's test split."""
    monkeypatch.setenv("KURTAIL_TEXT", str(texts))
    model, paths, over = models(family_of(recipes)), map(recipe_file, recipes.split()), tmp_path / "tiny.yaml"
    settings = settings_of(*paths)
    over.write_text(yaml.safe_dump(tiny(settings, model)))
    kurtail(tmp_path, "fit", *flags(recipes), "--config", over)

    asked = merged(settings, yaml.safe_load(over.read_text()))
    quantize = {name: value for name, value in asked["quantization"].items() if name != "out"}
    quantize["text"]["source"] = "wikitext"
    quantize["target"] = asked["target"]
    for slot in ("rounder", "matching", "clips", "transforms", "bits"):
        quantize[slot] = None if quantize[slot] is None else by_kind(quantize[slot])
    quantize["scheme"] |= {part: by_kind(quantize["scheme"][part]) for part in ("weights", "cache")}
    (folder,) = (tmp_path / "artifacts").iterdir()
    assert folder.name.startswith(f"{model.name}-{RUN[recipes]}-w4a4kv4-")
    assert scheme_of(folder) == Scheme.from_dict(quantize["scheme"])
    card, results = read_card(folder), json.loads((folder / "results.json").read_text())
    assert card["method"] == results["method"] == RUN[recipes]
    assert card["quantize"] == json.loads(json.dumps(quantize))
    assert set(quantize) == set(QuantizeSpec.__dataclass_fields__)
    evaluation = results["evaluation"]
    assert (evaluation["source"], evaluation["seqlen"]) == ("wikitext", 48)
    ids = AutoTokenizer.from_pretrained(model)((texts / "wikitext" / "test.txt").read_text())["input_ids"]
    windows = len(ids) // 48 if asked["evaluation"]["text"]["windows"] is None else 4
    assert windows >= 4
    assert (evaluation["windows"], evaluation["tokens"]) == (windows, 47 * windows)
    assert math.isfinite(evaluation["perplexity"])
