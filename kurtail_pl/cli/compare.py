"""`kurtail compare`: recipes, their baselines, seeds and ways to round weights, each made by `fit`, in one table."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from kurtail_pl.cli.trainer import RECIPE, KurtailCLI, RecipeCLI, callback_of, command_line, fit
from kurtail_pl.errors import ArtefactError, ConfigError
from kurtail_pl.lit.callbacks import Evaluation, WeightQuantization
from kurtail_pl.stages.comparison import Row, write_comparison
from kurtail_pl.stages.results import FLOAT_METHOD, RESULTS, artefact_name, evaluate_folder, read_results
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.files import write_text
from kurtail_pl.storage.folder import is_ours
from kurtail_pl.storage.resume import differences
from kurtail_pl.surgery.scheme import FLOAT

log = logging.getLogger(__name__)

FIXED, ROWS = "kurtail_pl.lit.FixedRotations", "kurtail_pl.lit.ActivationDataModule"
ROUNDINGS = ("float", "rtn", "gptq")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model of the table: a complete recipe, and the seed of its rotations."""

    settings: Settings
    seed: int

    @property
    def root(self) -> str:
        """Its run folder; cells that differ in the weights alone share one, and learn once."""
        return str(self.settings["trainer"]["default_root_dir"])


def compare(arguments: list[str]) -> None:
    """Run recipes, their baselines and seeds, and print one table."""
    options, overrides = _options(arguments)
    recipes = [_effective(path, overrides) for path in options.config]
    folder = options.folder or Path("comparisons") / options.config[0].stem
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    begun: set[str] = set()
    for number, cell in enumerate(_cells(recipes, options.weights, options.seeds)):
        path = folder / "recipes" / f"{number:02d}.yaml"
        write_text(path, yaml.safe_dump(cell.settings, sort_keys=False))
        cli = command_line(KurtailCLI, "kurtail compare", ["--config", str(path)], run=False)
        rows.append(Row(_make(cli, path, cell, options.overwrite, cell.root in begun), cell.seed))
        begun.add(cell.root)
        if number == 0:
            rows.insert(0, Row(_reference(cli, options.overwrite), cell.seed))
    print(write_comparison(rows, folder))


def _make(cli: KurtailCLI, recipe: Path, cell: Cell, overwrite: bool, learned: bool) -> Path:
    """Run a cell's recipe unless its artefact stands there, finished; returns the artefact."""
    quantization, _ = _callbacks(cli)
    folder = quantization.folder(cli.model, cli.datamodule)
    if overwrite and is_ours(folder):
        shutil.rmtree(folder)
    elif (folder / RESULTS).is_file():
        found = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")) if (folder / RECIPE).is_file() else {}
        _require_same(folder, {**_decisive(found), **_measured(folder)}, {**_decisive(cell.settings), **_origin(cli)})
        log.info("reusing %s", folder)
        return folder
    # What was learned a moment ago, for other weights, is not learned again.
    fit(["--config", str(recipe), *(["--overwrite"] if overwrite and not learned else [])])
    return folder


def _reference(cli: KurtailCLI, overwrite: bool) -> Path:
    """Measure the float model, or reuse what was measured."""
    quantization, evaluation = _callbacks(cli)
    data = cli.datamodule
    folder = quantization.artefacts / artefact_name(data.capture_spec.model, FLOAT_METHOD, FLOAT)
    if not overwrite and (folder / RESULTS).is_file():
        _require_same(folder, _measured(folder), _origin(cli))
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    store = ActivationStore(data.store_folder)
    evaluate_folder(data.checkpoint, folder, evaluation.text, store, data.validation_rows)
    return folder


def _decisive(settings: Settings) -> Settings:
    """The settings of a recipe that decide its numbers: not where things are put."""
    if not settings:
        return {}
    data = {key: value for key, value in settings["data"]["init_args"].items() if key != "store"}
    return {
        "model": settings["model"],
        "data": data,
        "quantize": _callback(settings, "WeightQuantization")["quantize"],
        "evaluation": _callback(settings, "Evaluation"),
        "seed_everything": settings["seed_everything"],
    }


def _origin(cli: KurtailCLI) -> Settings:
    """What a recipe would measure: hashes of model and text, windows and rows."""
    _, evaluation = _callbacks(cli)
    data = cli.datamodule
    text = cut_windows(data.checkpoint.tokenizer(), evaluation.text, "evaluation")
    return {
        "model_sha256": data.checkpoint.sha256,
        "kurtosis_rows": data.validation_rows,
        "text_sha256": text.text_sha256,
        **asdict(text.spec),
    }


def _measured(folder: Path) -> Settings:
    """The same of results that stand there."""
    results = read_results(folder)
    text = {key: results["evaluation"].get(key) for key in ("text_sha256", *TextSpec.__dataclass_fields__)}
    return {**results["measured"], **text}


def _require_same(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raise ArtefactError, naming the differences, when results are not those that are wanted."""
    different = differences(found, json.loads(json.dumps(wanted)))
    if different:
        raise ArtefactError(
            f"{folder} was made or measured with other settings: {'; '.join(different)}; pass --overwrite, or remove it"
        )


def _callbacks(cli: KurtailCLI) -> tuple[WeightQuantization, Evaluation]:
    quantization, evaluation = (callback_of(cli.trainer, kind) for kind in (WeightQuantization, Evaluation))
    if not isinstance(quantization, WeightQuantization) or not isinstance(evaluation, Evaluation):
        raise ConfigError("compare needs recipes with the callbacks WeightQuantization and Evaluation")
    return quantization, evaluation


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "kurtail compare", description=__doc__, epilog="Other options override settings of every recipe, as in fit."
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="recipes")
    parser.add_argument(
        "--weights", nargs="+", choices=ROUNDINGS, help="how weights become integers; as the recipe says if not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of the rotations; the recipe's own if not given")
    parser.add_argument("--folder", type=Path, help="for table, picture and recipes (comparisons/RECIPE)")
    parser.add_argument("--overwrite", action="store_true", help="make everything anew")
    return parser.parse_known_args(arguments)


def _effective(recipe: Path, overrides: list[str]) -> Settings:
    """A recipe with its overrides and every default written out."""
    if not recipe.is_file():
        raise ConfigError(f"recipe {recipe} does not exist; name a YAML file such as configs/smollm2-135m.yaml")
    cli = command_line(RecipeCLI, "kurtail compare", ["--config", str(recipe), *overrides], run=False)
    text = cli.parser.dump(cli.config, skip_none=False, skip_link_targets=True)
    settings: Settings = yaml.safe_load(text)
    for name in ("config", "overwrite"):
        settings.pop(name, None)
    return settings


def _cells(recipes: list[Settings], weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """Every cell: the recipes, and what the first one is compared with, unless another recipe brings it."""
    given = [_fixed(settings) for settings in recipes]
    for hadamard in (False, True):
        if hadamard not in given:
            # Without rotations there is nothing for a seed to decide, and both ways to round are baselines.
            yield from _variants(
                _baseline(recipes[0], hadamard),
                weights or (["rtn", "gptq"] if not hadamard else None),
                seeds if hadamard else None,
            )
    for settings in recipes:
        yield from _variants(settings, weights, seeds if _fixed(settings) is not False else None)


def _fixed(settings: Settings) -> bool | None:
    """Whether a recipe's fixed rotations are Hadamards; None when its rotations are learned."""
    model = settings["model"]
    return bool(model["init_args"]["hadamard"]) if model["class_path"].endswith("FixedRotations") else None


def _baseline(settings: Settings, hadamard: bool) -> Settings:
    """A recipe with fixed rotations in place of learned ones: the same text, store, bits and evaluation."""
    derived = copy.deepcopy(settings)
    seed = settings["model"]["init_args"]["rotation_seed"]
    derived["model"] = {"class_path": FIXED, "init_args": {"hadamard": hadamard, "rotation_seed": seed}}
    data = derived["data"]["init_args"]
    kept = {name: data[name] for name in ("capture", "store", "steps", "validation_rows")}
    derived["data"] = {"class_path": ROWS, "init_args": kept | {"batch_rows": 1}}
    trainer = derived["trainer"]
    trainer["max_epochs"] = 0
    trainer["callbacks"] = [c for c in trainer["callbacks"] if not c["class_path"].endswith("ModelCheckpoint")]
    _move(derived, "quarot" if hadamard else "none")
    return derived


def _variants(settings: Settings, weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """A recipe with each seed and each way to round its weights."""
    own = settings["model"]["init_args"]["rotation_seed"]
    for seed in seeds or [own]:
        seeded = copy.deepcopy(settings)
        if seed != own:
            seeded["model"]["init_args"]["rotation_seed"] = seed
            _move(seeded, f"seed{seed}")
        yield from (Cell(_rounded(seeded, rounding), seed) for rounding in weights or (None,))


def _move(settings: Settings, name: str) -> None:
    """Give a variant a run folder beside the recipe's, and to a seed artefacts of its own."""
    root = settings["trainer"]["default_root_dir"]
    settings["trainer"] = _renamed(settings["trainer"], root, f"{root}-{name}")
    if name.startswith("seed"):
        quantization = _callback(settings, "WeightQuantization")
        quantization["artefacts"] = f"{quantization['artefacts']}/{name}"


def _renamed(value: Any, old: str, new: str) -> Any:
    """Settings in which a folder, and all that lies in it, has another name."""
    if isinstance(value, dict):
        return {key: _renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith(f"{old}/"))
    return new + value.removeprefix(old) if inside else value


def _rounded(settings: Settings, rounding: str | None) -> Settings:
    """A recipe whose weights become integers so; a way that is not its own has artefacts of its own."""
    changed = copy.deepcopy(settings)
    quantization = _callback(changed, "WeightQuantization")
    spec = quantization["quantize"]
    if rounding == "float":
        spec["scheme"]["weights"] = None
    elif rounding is not None:
        if spec["scheme"]["weights"] is None:
            raise ConfigError(f"--weights {rounding} needs recipes that quantize weights; give scheme.weights")
        # Without rotations, the way to round is the artefact's name.
        if rounding != spec["method"] and _fixed(settings) is not False:
            quantization["artefacts"] = f"{quantization['artefacts']}/{rounding}"
        spec["method"] = rounding
    return changed


def _callback(settings: Settings, name: str) -> Settings:
    for callback in settings["trainer"]["callbacks"] or []:
        if callback["class_path"].endswith(f".{name}"):
            found: Settings = callback["init_args"]
            return found
    raise ConfigError(f"compare needs a recipe with the callback {name}; add it to trainer.callbacks")
