"""The models of a table: recipes parsed, each made by `fit`, or taken as it stands when it is what the recipe says."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kurtail_pl.cli.cells import Cell, Recipe
from kurtail_pl.cli.later import RecipeCLI, WaitingCLI
from kurtail_pl.cli.naming import Settings, made_by, reference_suffix
from kurtail_pl.cli.refusals import require_possible, require_sensible
from kurtail_pl.cli.saving import RECIPE
from kurtail_pl.cli.trainer import KurtailCLI, command_line
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
from kurtail_pl.stages.reporting.lines import Row
from kurtail_pl.stages.reporting.report import is_reported, report
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.card import read_card
from kurtail_pl.storage.files import sha256_of_text, write_text
from kurtail_pl.storage.keys import settings_key, unspelled
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.resume import differences

log = logging.getLogger(__name__)

NAME_LENGTH = 60
"""Of a folder that is named after recipes; where these are many, digits of a hash stand for the rest."""


def default_folder(recipes: Sequence[str]) -> Path:
    """Where the table of recipes goes when nobody says otherwise."""
    name = "-".join(Path(name).stem for name in recipes)
    short = name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH]}-{sha256_of_text(name)[:6]}"
    return Path("comparisons") / short


def recipe_of(arguments: list[str], roundings: list[str]) -> Recipe:
    """A recipe, and the same under each of the recipes that say how weights are rounded."""
    own = _effective(arguments)
    return Recipe(own, {name: _effective([*arguments, "--config", name]) for name in roundings})


def _effective(arguments: list[str]) -> Settings:
    """A recipe with its overrides and every default written out."""
    cli = command_line(RecipeCLI, "kurtail compare", arguments, run=False)
    text = cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=True)
    settings: Settings = yaml.safe_load(text)
    for name in ("config", "overwrite"):
        settings.pop(name, None)
    return settings


@dataclass(frozen=True)
class Parsed:
    """A cell, the file of its recipe, and what its command line makes of that."""

    cell: Cell
    path: Path
    cli: WaitingCLI

    @property
    def quantization(self) -> WeightQuantization:
        """The callback that rounds its weights."""
        return _callbacks(self.cli)[0]

    @property
    def title(self) -> str:
        """Its method, and how weights are rounded where that is not the whole method."""
        spec = self.quantization.spec
        name = spec.method_name(self.cli.model.method)
        return name if name == spec.rounding else f"{name} ({spec.rounding})"

    @property
    def artefact(self) -> Path:
        """The folder that it makes."""
        return self.quantization.folder(self.cli.model, self.cli.datamodule)

    @property
    def float_folder(self) -> Path:
        """The folder of what is measured of its float model."""
        data = self.cli.datamodule
        name = artefact_name(data.capture_spec.model, FLOAT_METHOD, FLOAT.name)
        return ARTEFACTS / (name + reference_suffix(self.cli.settings, self.cli.base))


class Maker:
    """Makes the models of a table, each once.

    Args:
        folder: of the table; the recipes of its models go into its folder `recipes`.
        overwrite: make them anew where they stand.
    """

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._begun: set[Path] = set()
        self._made: set[Path] = set()
        self._parsed: list[Parsed] = []

    def parse(self, cell: Cell) -> Parsed:
        """Write a cell's recipe, and read it as a command line would; each cell once."""
        found = next((parsed for parsed in self._parsed if parsed.cell == cell), None)
        if found is not None:
            return found
        (self.folder / "recipes").mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipes" / f"{len(self._parsed):02d}.yaml"
        with alone_with(self.folder):  # Another process may compare the same recipes.
            write_text(path, yaml.safe_dump(cell.settings, sort_keys=False))
        again = ["--overwrite"] if self.overwrite else []
        cli = command_line(WaitingCLI, "kurtail compare", ["fit", "--config", str(path), *again])
        self._parsed.append(Parsed(cell, path, cli))
        return self._parsed[-1]

    def stands(self, folder: Path) -> bool:
        """Whether a folder stands there, measured, and is not to be made anew."""
        return (folder / RESULTS).is_file() and (not self.overwrite or folder in self._made)

    def check(self, cell: Cell) -> None:
        """Raise what `fit` would raise of a cell before it does any work; nothing of one that stands there."""
        parsed = self.parse(cell)
        if not self.stands(parsed.artefact):
            require_sensible(parsed.cli.trainer)
            require_possible(parsed.cli.trainer, parsed.cli.model, parsed.cli.datamodule)

    def make(self, parsed: Parsed) -> Row:
        """Run a cell's recipe unless its artefact stands there, finished.

        Cells that differ in the weights alone share a run folder, and learn once.

        Raises:
            ArtefactError: when what stands there was made or measured with other settings.
        """
        cli, folder = parsed.cli, parsed.artefact
        root = Path(cli.trainer.default_root_dir)
        with alone_with(root):
            if self.stands(folder):
                recipe = folder / RECIPE
                found = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
                have = {**_decisive(found), **_made_from(folder), **_measured(folder)}
                _require_same(folder, have, {**_decisive(cli.settings), **_to_be_made_from(cli), **_origin(cli)})
                log.info("reusing %s", folder)
                if not is_reported(folder):  # It was measured, and the disk was full then.
                    report(folder)
            else:
                # What was learned a moment ago serves for other weights too.
                learned = cli.last_checkpoint() if root in self._begun else None
                self._begun.add(root)
                cli.begin(learned)
                self._made.add(folder)
        return Row(folder, parsed.cell.seed, parsed.cell.name)

    def measure_float(self, parsed: Parsed) -> Row:
        """Measure the float model of a cell that is made, or take what was measured."""
        _, evaluation = _callbacks(parsed.cli)
        data = parsed.cli.datamodule
        folder = parsed.float_folder
        with alone_with(folder):
            if self.stands(folder):
                _require_same(folder, _measured(folder), _origin(parsed.cli))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                evaluate_folder(
                    data.checkpoint,
                    folder,
                    evaluation.text,
                    ActivationStore(data.store_folder),
                    data.validation_rows,
                    evaluation.tasks,
                    data.compute,
                )
        return Row(folder, parsed.cell.seed)


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
