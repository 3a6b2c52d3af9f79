"""The verbs that need a trainer: a LightningCLI over module, data module, and the pipeline's sections of a recipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from jsonargparse import Namespace
from jsonargparse._common import parser_context
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.failures import ours_in
from kurtail_pl.cli.main import sentence
from kurtail_pl.cli.naming import Settings, artefact_suffix, run_folder, store_folder
from kurtail_pl.cli.quiet import quiet_lightning
from kurtail_pl.cli.recipes import BASE, FOLDER
from kurtail_pl.cli.refusals import require_possible, require_sensible
from kurtail_pl.cli.saving import KeepConfig
from kurtail_pl.cli.usage import WRONG_SETTING, OneLine, late_errors_explained
from kurtail_pl.errors import ConfigError, reason, require_seed
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.callbacks import (
    Checkpoints,
    Evaluation,
    Figures,
    Fusion,
    RotationWriter,
    StepLines,
    WeightQuantization,
)
from kurtail_pl.lit.callbacks.checkpoints import checkpoint_folder
from kurtail_pl.lit.checkpoint import require_checkpoint
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.methods.targets import TargetName
from kurtail_pl.storage.lock import alone_with

log = logging.getLogger(__name__)

SECTIONS: dict[str, type[L.Callback]] = {
    "checkpoints": Checkpoints,
    "fusion": Fusion,
    "quantization": WeightQuantization,
    "figures": Figures,
    "evaluation": Evaluation,
}
"""A recipe has these sections beside model, data and trainer, here in the order in which they do their work."""
LINKED = {
    "sizes": ("data.sizes",),
    "aim": ("quantization.scheme", "fusion.online", "fusion.block_size"),
}
"""These arguments of the module are never given by hand; their values come from here."""
TEXTS = ("data.init_args.text", "fusion.scales.text", "fusion.signs.text", "quantization.text", "evaluation.text")
TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "deterministic": True,
    "precision": "32-true",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}

_BASES: dict[tuple[str, ...], Settings] = {}
"""What `KurtailCLI.base` read so far; nobody changes it."""


class RecipeParser(OneLine, LightningArgumentParser):
    """Understands recipes."""

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The settings of base.yaml, in the form that values have while they are parsed.

        jsonargparse merges those of a verb into what is parsed so far, where a dataclass that may be null, in a class's
        settings, still has its class_path; by itself it would give them without, and the two do not merge.
        """
        with parser_context(lenient_check=True):
            defaults: Namespace = super().get_defaults(*args, **kwargs)
            return defaults


class KurtailCLI(LightningCLI):
    """LightningCLI with a section for each step of the pipeline, whose sizes come from the data module."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is asked for: a parser of each of Lightning's four takes as long again."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb == sys.argv[1]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections and `--overwrite`; link the sizes."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace an existing artefact folder")
        parser.add_argument("--target", type=TargetName, default="torch", help="runtime that the artefact is made for")
        for name, kind in SECTIONS.items():
            parser.add_lightning_class_args(kind, name)
        parser.link_arguments("target", "quantization.target")
        made = {"sizes": None, "aim": Aim}
        for name, sources in LINKED.items():
            parser.link_arguments(sources, f"model.init_args.{name}", made[name], apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: Lightning would import the class that it names."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse a seed that NumPy does not take and a checkpoint that cannot be read."""
        super().parse_arguments(parser, args)
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        require_seed("seed_everything", config["seed_everything"])
        if config.get("ckpt_path"):
            require_checkpoint(Path(config["ckpt_path"]), "name another, or leave out --ckpt_path")

    def before_instantiate_classes(self) -> None:
        """Refuse sizes that were given by hand: the link would replace them without a word. Name texts and the store.

        A text without a source is the one that activations are captured from.
        """
        given = self._get(self.config, "model").get("init_args", {})
        by_hand = next((name for name in LINKED if given.get(name) not in (None, False)), None)
        if by_hand is not None:
            sections = {"sizes": "the model to be quantized", "aim": "the sections quantization and fusion"}
            raise ConfigError(
                f"model.init_args.{by_hand} is set to {given[by_hand]}, but it comes from {sections[by_hand]}; remove "
                "it from the recipe"
            )
        config = self._config
        source = config.data.init_args.capture.text.source
        for place in TEXTS:
            text = config.get(place)
            if text is not None and text.source is None:
                text.source = source
                if place == "evaluation.text" and Path(str(source)).expanduser().is_file():
                    raise ConfigError(
                        f"evaluation.text.source is null and the calibration text is the file {source}; name a text to "
                        "evaluate on"
                    )
        if config.data.init_args.store is None:
            config.data.init_args.store = str(store_folder(self.settings, self.base))

    @property
    def _config(self) -> Namespace:
        """The settings of the verb."""
        config: Namespace = self.config.get(str(self.subcommand), self.config)
        return config

    @property
    def settings(self) -> Settings:
        """The whole recipe as plain data."""
        return _plain(self._config)

    @cached_property
    def base(self) -> Settings:
        """What a recipe would be without its own settings, but for the classes of its module and data module."""
        kinds = {name: self.settings[name]["class_path"] for name in ("model", "data")}
        key = (*kinds.values(), str(self.trainer_defaults))
        if key not in _BASES:  # Reading takes half a second, and a table has dozens of recipes.
            settings = {name: {"class_path": kind} for name, kind in kinds.items()}
            _BASES[key] = _plain(self._parser(self.subcommand).parse_object(settings, defaults=True))
        return _BASES[key]

    def _dump_config(self) -> None:
        """Write out nothing: Lightning wants the recipe for hyperparameters, which no class here saves."""
        self.config_dump: Settings = {}

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as self._claims:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Let the callbacks refuse what would fail after capture and training; go on with an unfinished run.

        A run folder has one `fit` at a time: another waits here, and then finds what the first one left.
        """
        require_sensible(self.trainer)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._claims.enter_context(alone_with(Path(self.trainer.default_root_dir)))
        require_possible(self.trainer, self.model, self.datamodule)
        last = self.last_checkpoint()
        if last is not None and not self._get(self.config, "overwrite") and not self._get(self.config, "ckpt_path"):
            require_checkpoint(last, "remove it to learn anew, or pass --overwrite")
            log.info("going on from %s", last)
            self.config_init["fit"]["ckpt_path"] = str(last)

    def last_checkpoint(self) -> Path | None:
        """What an earlier run of the recipe left, finished or not."""
        last = checkpoint_folder(self.trainer) / f"{Checkpoints.CHECKPOINT_NAME_LAST}{Checkpoints.FILE_EXTENSION}"
        return last if last.is_file() else None

    def instantiate_classes(self) -> None:
        """Make what the verb needs of the settings; what is found wrong only now is said as it is when parsing."""
        with late_errors_explained():
            self.make_classes()

    def make_classes(self) -> None:
        """Make everything."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Name the folders that are open, and bring the callbacks into their order.

        The recipe follows the artefact there at once.
        """
        module, data, trainer = self.model, self.datamodule, self._config.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = kwargs["default_root_dir"] = str(
                run_folder(self.settings, self.base, module.method)
            )
        if trainer.logger is None:
            kwargs["logger"] = TensorBoardLogger(trainer.default_root_dir, "tensorboard")
        if not module.learns:
            kwargs["max_epochs"] = 0
        quantization: WeightQuantization = self._get(self.config_init, "quantization")
        quantization.overwrite = self._get(self.config, "overwrite")
        if quantization.out is None:
            folder = quantization.folder(module, data)
            quantization.out = folder.with_name(folder.name + artefact_suffix(self.settings, self.base))
            self._config.quantization.out = str(quantization.out)
        try:
            made = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            if ours_in(error) is not None or WRONG_SETTING in str(error):
                raise
            raise ConfigError(f"trainer: {reason(error)}; correct the trainer in the recipe") from error
        made.callbacks = list(self._in_order(made.callbacks))  # type: ignore[attr-defined]
        return made

    def _in_order(self, callbacks: list[L.Callback]) -> Iterator[L.Callback]:
        """The recipe's callbacks and those that it does not name; without a training, not those that show one."""
        keep = next((callback for callback in callbacks if isinstance(callback, KeepConfig)), None)
        for callback in callbacks:
            if callback is keep or (isinstance(callback, Checkpoints | Figures) and not self.model.learns):
                continue
            if isinstance(callback, Fusion):
                yield RotationWriter()
            yield callback
            if isinstance(callback, WeightQuantization) and keep is not None:
                yield keep
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            yield StepLines()


def _plain(config: Namespace) -> Settings:
    """Settings without those that others decide, as a saved recipe has them."""
    settings: Settings = config.clone().as_dict()
    for name in LINKED:
        settings["model"].get("init_args", {}).pop(name, None)
    settings["quantization"].pop("target", None)
    return settings


CLI = TypeVar("CLI", bound=KurtailCLI)


def command_line(kind: type[CLI], program: str, arguments: list[str], run: bool = True) -> CLI:
    """Parse a recipe and its overrides as a Lightning CLI of a kind; runs the verb unless told not to."""
    sys.argv = [program, *prepared(arguments)]  # LightningCLI reads it, and warns when it is given both.
    quiet_lightning()
    verb = arguments[0] if run else program.split()[1]
    common: dict[str, Any] = {"default_config_files": [str(FOLDER / BASE)], "description": sentence(verb)}
    return kind(
        RotationModule,
        StoredModel,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "enable_progress_bar": sys.stderr.isatty()},
        save_config_callback=KeepConfig,
        parser_class=RecipeParser,
        parser_kwargs={arguments[0]: common} if run else common,
        run=run,
    )


def fit(arguments: list[str]) -> None:
    """Capture, learn rotations, fuse, quantize and evaluate, as a recipe says."""
    command_line(KurtailCLI, "kurtail", ["fit", *arguments])


def validate(arguments: list[str]) -> None:
    """Report the kurtosis of a checkpoint's rotations."""
    command_line(KurtailCLI, "kurtail", ["validate", *arguments])
