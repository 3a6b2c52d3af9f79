"""Recipes of the paper and of the protocols: planned as they stand, and run on a tiny model of their family."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentences
from families import tiny_family
from transformers import AutoTokenizer

from kurtail_pl.stages.quantize import QuantizeSpec
from kurtail_pl.storage.folder import read_card, scheme_of
from kurtail_pl.surgery.scheme import Scheme

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER, PROTOCOLS, ABLATION = CONFIGS / "paper", CONFIGS / "protocols", CONFIGS / "ablation"
WHOLE = sorted([*(path for path in PAPER.glob("*.yaml") if path.stem != "spinquant"), *PROTOCOLS.glob("*.yaml")])
TINY: dict[str, Any] = {
    "rows": 120, "steps": 2, "batch_rows": 32, "batch_windows": 2, "validation_rows": 40, "tasks": None
}  # fmt: skip
RUN: dict[str, tuple[list[Path], str]] = {
    "kurtail-w4a4kv4": ([PROTOCOLS / "kurtail.yaml"], "llama3"),
    "quarot-w4a4kv4": ([PROTOCOLS / "quarot.yaml"], "llama3"),
    "spinquant-w4a4kv4": ([PROTOCOLS / "spinquant.yaml"], "llama3"),
    "flatquant": ([PROTOCOLS / "flatquant.yaml"], "llama3"),
    "dartquant": ([PROTOCOLS / "dartquant.yaml"], "llama3"),
    "paper-llama": ([PAPER / "llama-3-8b.yaml"], "llama3"),
    "paper-llama-rtn": ([PAPER / "llama-3-8b-rtn.yaml"], "llama3"),
    "paper-spinquant": ([PAPER / "llama-3-8b.yaml", PAPER / "spinquant.yaml"], "llama3"),
    "paper-phi": ([PAPER / "phi-3-mini.yaml"], "phi3"),
    "paper-mixtral": ([PAPER / "mixtral-8x7b.yaml"], "mixtral"),
    "ablation-combined": ([ABLATION / "smollm2-135m.yaml", ABLATION / "calibration-combined.yaml"], "llama3"),
}


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


def shrunk(node: Any, model: Path) -> Any:
    """A recipe for a tiny model: short windows, few of them, few rows and steps; whole texts stay whole."""
    if isinstance(node, list):
        return [shrunk(child, model) for child in node]
    if not isinstance(node, dict):
        return node
    small = {key: TINY.get(key, shrunk(child, model)) for key, child in node.items()}
    if "seqlen" in node or "windows" in node:
        small |= {"seqlen": 48, "windows": None if node.get("windows", 0) is None else 4}
    if isinstance(node.get("model"), str):
        small["model"] = str(model)
    if node.get("group_size") is not None:
        small["group_size"] = 4
    return small


def quantization(recipe: dict[str, Any]) -> dict[str, Any]:
    callbacks = {c["class_path"].rsplit(".", 1)[1]: c.get("init_args") for c in recipe["trainer"]["callbacks"]}
    return {**callbacks["WeightQuantization"], "evaluation": callbacks["Evaluation"]["text"]}


@pytest.mark.parametrize("recipe", WHOLE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_plan_needs_neither_weights_nor_text(
    recipe: Path,
    kurtail: Kurtail,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KURTAIL_TEXT", str(tmp_path / "nowhere"))
    family = {"phi-3-mini": "phi3", "mixtral-8x7b": "mixtral"}.get(recipe.stem, "llama3")
    config = tmp_path / "config"
    config.mkdir()
    tiny = json.loads((models(family) / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**tiny, "max_position_embeddings": 8192}))
    kurtail(tmp_path, "plan", "--config", recipe, "--data.init_args.capture.model", config)
    stages = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert stages == ["stage", "--------", "capture", "learn", "fuse", "quantize", "evaluate"]


@pytest.mark.parametrize("case", RUN)
def test_a_recipe_runs(
    case: str,
    kurtail: Kurtail,
    models: Callable[[str], Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From texts by name to results on the whole of WikiText's test split."""
    monkeypatch.setenv("KURTAIL_TEXT", str(texts))
    paths, family = RUN[case]
    model, flags = models(family), []
    for number, path in enumerate(paths):
        small = shrunk(yaml.safe_load(path.read_text()), model)
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(small))
        flags += ["--config", f"{number}.yaml"]
    kurtail(tmp_path, "fit", *flags)

    asked = quantization(shrunk(yaml.safe_load(paths[0].read_text()), model))
    (folder,) = (tmp_path / asked["artefacts"]).iterdir()
    method = {"quarot": "quarot", "spinquant": "spinquant"}.get(paths[-1].stem, "kurtail")
    assert folder.name == f"{model.name}-{method}-w4a4kv4"
    assert scheme_of(folder) == Scheme.from_dict(asked["quantize"]["scheme"])
    card, results = read_card(folder), json.loads((folder / "results.json").read_text())
    assert card["method"] == results["method"] == method
    assert card["quantize"] == json.loads(json.dumps(asked["quantize"]))
    assert set(asked["quantize"]) == set(QuantizeSpec.__dataclass_fields__)
    evaluation = results["evaluation"]
    assert (evaluation["source"], evaluation["seqlen"]) == ("wikitext", 48)
    ids = AutoTokenizer.from_pretrained(model)((texts / "wikitext" / "test.txt").read_text())["input_ids"]
    windows = len(ids) // 48 if asked["evaluation"]["windows"] is None else 4
    assert windows >= 4
    assert (evaluation["windows"], evaluation["tokens"]) == (windows, 47 * windows)
    assert math.isfinite(evaluation["perplexity"])
