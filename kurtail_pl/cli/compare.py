"""`kurtail compare`: recipes, their baselines, seeds and ways to round weights, each made by `fit`, in one table."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import yaml

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.cells import BASELINES, Recipe, cells_of
from kurtail_pl.cli.naming import Settings, made_by, reference_suffix
from kurtail_pl.cli.saving import RECIPE
from kurtail_pl.cli.trainer import KurtailCLI, RecipeCLI, command_line, fit
from kurtail_pl.cli.usage import OneLineParser
from kurtail_pl.errors import ArtefactError, listed
from kurtail_pl.lit.callbacks import Evaluation, Fusion, WeightQuantization
from kurtail_pl.lit.callbacks.order import callback_of
from kurtail_pl.lit.callbacks.quantization import ARTEFACTS
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.evaluation.results import (
    FLOAT_METHOD,
    RESULTS,
    artefact_name,
    evaluate_folder,
    measured_key,
    read_results,
)
from kurtail_pl.stages.evaluation.tasks.evaluate import questions_key
from kurtail_pl.stages.fusion.scales import scale_windows
from kurtail_pl.stages.fusion.signs import sign_windows
from kurtail_pl.stages.quantization.spec import calibration_windows
from kurtail_pl.stages.reporting.comparison import Row, write_comparison
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.card import read_card
from kurtail_pl.storage.files import write_text
from kurtail_pl.storage.keys import settings_key, unspelled
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.resume import differences

log = logging.getLogger(__name__)


def compare(arguments: list[str]) -> None:
    """Run recipes, their baselines and seeds, and print one table."""
    options, overrides = _options(arguments)
    common = [argument for path in options.config for argument in ("--config", path)]
    # The baselines are those of the first recipe.
    recipes = [
        _recipe([*common, *overrides], options.weights or BASELINES),
        *(_recipe([*common, *_overlays(names), *overrides], options.weights or []) for names in options.others),
    ]
    folder = options.out or Path("comparisons") / "-".join(Path(path).stem for path in options.config)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    begun: set[Path] = set()
    for number, cell in enumerate(cells_of(recipes, options.weights, options.seeds)):
        path = folder / "recipes" / f"{number:02d}.yaml"
        with alone_with(folder):  # Another process may compare the same recipes.
            write_text(path, yaml.safe_dump(cell.settings, sort_keys=False))
        cli = command_line(KurtailCLI, "kurtail compare", ["--config", str(path)], run=False)
        rows.append(Row(_make(cli, path, options.overwrite, begun), cell.seed))
        if number == 0:
            rows.insert(0, Row(_reference(cli, options.overwrite), cell.seed))
    with alone_with(folder):
        print(write_comparison(rows, folder))


def _overlays(names: str) -> list[str]:
    """Recipes that go over the common ones, given by their names with commas between."""
    return [argument for name in names.split(",") for argument in ("--config", name)]


def _recipe(arguments: list[str], roundings: list[str]) -> Recipe:
    """A recipe, and the same under each of the recipes that say how weights are rounded."""
    own = _effective(arguments)
    return Recipe(own, {name: _effective([*arguments, "--config", name]) for name in roundings})


def _make(cli: KurtailCLI, recipe: Path, overwrite: bool, begun: set[Path]) -> Path:
    """Run a cell's recipe unless its artefact stands there, finished; returns the artefact.

    Cells that differ in the weights alone share a run folder, and learn once.
    """
    quantization, _ = _callbacks(cli)
    folder, root = quantization.folder(cli.model, cli.datamodule), Path(cli.trainer.default_root_dir)
    with alone_with(root):
        if (folder / RESULTS).is_file() and not overwrite:
            found = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")) if (folder / RECIPE).is_file() else {}
            have = {**_decisive(found), **_made_from(folder), **_measured(folder)}
            _require_same(folder, have, {**_decisive(cli.settings), **_to_be_made_from(cli), **_origin(cli)})
            log.info("reusing %s", folder)
            return folder
        again = ["--overwrite"] if overwrite else []
        last = cli.last_checkpoint()
        if root in begun and last is not None:
            again += ["--ckpt_path", str(last)]  # What was learned a moment ago, for other weights.
        begun.add(root)
        fit(["--config", str(recipe), *again])
    return folder


def _reference(cli: KurtailCLI, overwrite: bool) -> Path:
    """Measure the float model, or reuse what was measured."""
    _, evaluation = _callbacks(cli)
    data = cli.datamodule
    name = artefact_name(data.capture_spec.model, FLOAT_METHOD, FLOAT.name)
    folder = ARTEFACTS / (name + reference_suffix(cli.settings, cli.base))
    with alone_with(folder):
        if not overwrite and (folder / RESULTS).is_file():
            _require_same(folder, _measured(folder), _origin(cli))
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        store = ActivationStore(data.store_folder)
        evaluate_folder(
            data.checkpoint, folder, evaluation.text, store, data.validation_rows, evaluation.tasks, data.compute
        )
    return folder


def _decisive(settings: Settings) -> Settings:
    """The settings of a recipe that decide its numbers: not where things are put or computed, or how they are named."""
    if not settings:
        return {}
    decisive: Settings = unspelled({**made_by(settings), "evaluation": settings["evaluation"]})
    return decisive


def _to_be_made_from(cli: KurtailCLI) -> Settings:
    """What a recipe's artefact is made from, by content."""
    quantization, _ = _callbacks(cli)
    data, fusion = cli.datamodule, callback_of(cli.trainer, Fusion) or Fusion()
    calibration = calibration_windows(data.checkpoint, quantization.spec)
    scales = None if fusion.scales is None else scale_windows(data.checkpoint, fusion.scales)
    signs = None if fusion.signs is None else sign_windows(data.checkpoint, fusion.signs)
    windows = {"calibration_text_sha256": calibration, "scales_text_sha256": scales, "signs_text_sha256": signs}
    return {
        "learned_from": data.settings(),
        **{name: None if each is None else each.text_sha256 for name, each in windows.items()},
    }


def _made_from(folder: Path) -> Settings:
    """The same of an artefact that stands there."""
    card = read_card(folder)
    return {
        "learned_from": card.get("rotations", {}).get("data"),
        "calibration_text_sha256": card.get("calibration_text_sha256"),
        **{name: card.get("fuse", {}).get(name) for name in ("scales_text_sha256", "signs_text_sha256")},
    }


def _origin(cli: KurtailCLI) -> Settings:
    """What a recipe would measure: model, text, windows and rows, tasks if it asks for them."""
    _, evaluation = _callbacks(cli)
    data = cli.datamodule
    text = cut_windows(data.checkpoint, evaluation.text, "evaluation")
    return {
        **measured_key(data.origin, data.validation_rows),
        "dtype": data.compute.dtype,
        "text_sha256": text.text_sha256,
        **settings_key(text.spec),
        **({} if evaluation.tasks is None else {"tasks": questions_key(evaluation.tasks)}),
    }


def _measured(folder: Path) -> Settings:
    """The same of results that stand there."""
    results = read_results(folder)
    text = {key: results["evaluation"].get(key) for key in ("text_sha256", "dtype", *TextSpec.__dataclass_fields__)}
    tasks = {key: results.get("tasks", {}).get(key) for key in ("settings", "harness", "files_sha256")}
    return {**results["measured"], **text, "tasks": tasks}


def _require_same(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raise ArtefactError, naming the differences, when results are not those that are wanted."""
    different = differences({key: found.get(key) for key in wanted}, json.loads(json.dumps(wanted)))
    if different:
        raise ArtefactError(
            f"{folder} was made or measured with other settings: {listed(different)}; pass --overwrite, or remove it"
        )


def _callbacks(cli: KurtailCLI) -> tuple[WeightQuantization, Evaluation]:
    quantization, evaluation = callback_of(cli.trainer, WeightQuantization), callback_of(cli.trainer, Evaluation)
    assert quantization is not None
    assert evaluation is not None
    return quantization, evaluation


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        "kurtail compare",
        description=compare.__doc__,
        epilog="Other options override settings of every recipe, as in fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], help="recipes, one over the other, as in fit")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="RECIPE[,RECIPE...]",
        help="another line of the table: these recipes over the common ones",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="RECIPE",
        help="recipes for how weights are rounded, such as float, rtn, gptq, hqq; as the recipe says if not given",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of the rotations; the recipe's own if not given")
    parser.add_argument("--out", type=Path, help="folder of table, picture and recipes (comparisons/RECIPES)")
    parser.add_argument("--overwrite", choices=("true", "false"), default="false", help="make everything anew")
    options, others = parser.parse_known_args(prepared(arguments, ("--with",)))
    options.overwrite = options.overwrite == "true"
    return options, others


def _effective(arguments: list[str]) -> Settings:
    """A recipe with its overrides and every default written out."""
    cli = command_line(RecipeCLI, "kurtail compare", arguments, run=False)
    text = cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=True)
    settings: Settings = yaml.safe_load(text)
    for name in ("config", "overwrite"):
        settings.pop(name, None)
    return settings
