"""The verbs that need a trainer: a LightningCLI over our module and datamodule."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.failures import UsageError, ours_in
from kurtail_pl.cli.usage import WRONG_SETTING, OneLine, explained
from kurtail_pl.errors import ConfigError, reason, require_seed
from kurtail_pl.lit.callbacks import Evaluation, Fusion, StepLines, WeightQuantization
from kurtail_pl.lit.callbacks.order import CheckedCallback, callback_of
from kurtail_pl.lit.checkpoint import require_checkpoint
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.meter import device_memory, free_memory, resident_memory
from kurtail_pl.stages.plan import plan
from kurtail_pl.stages.plan_table import misfits
from kurtail_pl.storage.files import free_disk, refuse_existing
from kurtail_pl.storage.lock import alone_with

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
"""The recipe as run, in an artefact."""
LINKED = ("layers", "hidden_size", "head_dim", "kv_heads", "rms_norm_eps")
TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "deterministic": True,
    "precision": "32-true",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class RecipeParser(OneLine, LightningArgumentParser):
    """Understands recipes."""


class KeepConfig(SaveConfigCallback):
    """Saves the recipe as run: `config.yaml` first, `config.resume-<n>.yaml` for each resume.

    Replacing `config.yaml` on a resume would leave `ckpt_path` in it, and running that file again would silently
    resume instead of repeating the run.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the name, then save."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        verb = self.config.get("subcommand")
        config = self.config.get(verb, self.config) if verb else self.config
        if config.get("ckpt_path"):
            self.config_filename = f"config.resume-{len(list(folder.glob('config.resume-*.yaml'))) + 1}.yaml"
        else:
            self.overwrite = True
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the recipe into the artefact; what is measured next is then known to be the recipe's."""
        quantization = callback_of(trainer, WeightQuantization)
        if trainer.is_global_zero and quantization is not None:
            assert isinstance(pl_module, RotationModule)
            folder = quantization.folder(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            recipe = self.config.clone()
            recipe["ckpt_path"] = None  # Whoever runs it again wants the whole run.
            self.parser.save(recipe, str(folder / RECIPE), skip_unset=False, overwrite=True, multifile=False)


class KurtailCLI(LightningCLI):
    """LightningCLI whose sizes come from the data module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self._claims:
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the sizes; add `--overwrite`."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace an existing artefact folder")
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

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
        """Say so when a size was given by hand: the link would replace it without a word."""
        given = self._get(self.config, "model").get("init_args", {})
        by_hand = [name for name in LINKED if given.get(name) is not None]
        if by_hand:
            raise ConfigError(
                f"model.init_args.{by_hand[0]} is set to {given[by_hand[0]]}, but sizes come from the model to be "
                "quantized; remove it from the recipe"
            )

    def before_fit(self) -> None:
        """Let the callbacks refuse what would fail after capture and training; go on with an unfinished run.

        A run folder has one `fit` at a time: another waits here, and then finds what the first one left.
        """
        self._require_sense()
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._claims.enter_context(alone_with(Path(self.trainer.default_root_dir)))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CheckedCallback):
                callback.check(self.trainer, self.model, self.datamodule)
        self._require_room()
        last = self.last_checkpoint()
        if last is not None and not self._get(self.config, "overwrite") and not self._get(self.config, "ckpt_path"):
            require_checkpoint(last, "remove it to learn anew, or pass --overwrite")
            log.info("going on from %s", last)
            self.config_init["fit"]["ckpt_path"] = str(last)

    def _require_sense(self) -> None:
        """Refuse what Lightning takes and what leads to nothing, or only after the training."""
        trainer = self.trainer
        if trainer.max_epochs == -1:
            raise ConfigError("trainer.max_epochs is -1, without an end; data.steps says how long: write 1")
        if trainer.accumulate_grad_batches < 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; give a positive number"
            )
        refuse_existing(Path(trainer.default_root_dir), overwrite=True)
        kinds = [type(c) for c in trainer.callbacks if isinstance(c, CheckedCallback)]  # type: ignore[attr-defined]
        twice = next((kind.__name__ for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ConfigError(f"trainer.callbacks has {twice} twice; keep one")

    def _require_room(self) -> None:
        """Refuse a recipe that does not fit this machine, before anything runs."""
        quantization, evaluation = callback_of(self.trainer, WeightQuantization), callback_of(self.trainer, Evaluation)
        if quantization is None or evaluation is None:
            return
        data, fusion = self.datamodule, callback_of(self.trainer, Fusion) or Fusion()
        data.compute.torch_device  # noqa: B018, refuses a device that is not there
        stages = plan(
            data.checkpoint.config, data.capture_spec, data.learning(), quantization.quantize_spec, evaluation.text,
            resident_memory(), data.compute, fusion.scales, fusion.signs,
        )  # fmt: skip
        found = misfits(stages, free_memory(), free_disk(data.store_folder), device_memory())
        if found:
            raise ConfigError(f"the recipe does not fit this machine: {'; '.join(found)}")

    def last_checkpoint(self) -> Path | None:
        """What an earlier run of the recipe left, finished or not."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                last = Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
                return last if last.is_file() else None
        return None

    def instantiate_classes(self) -> None:
        """Make everything of the settings; what jsonargparse finds wrong only now is said as it is when parsing."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if WRONG_SETTING not in str(error) or ours_in(error) is not None:
                raise
            raise UsageError(explained(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Hand `--overwrite` to the callback that writes the artefact, and let the recipe follow it there at once."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            if ours_in(error) is not None or WRONG_SETTING in str(error):
                raise
            raise ConfigError(f"trainer: {reason(error)}; correct the trainer in the recipe") from error
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        quantization, keep = callback_of(trainer, WeightQuantization), callback_of(trainer, KeepConfig)
        if quantization is not None:
            quantization.overwrite = self._get(self.config, "overwrite")
            if keep is not None:
                callbacks.remove(keep)
                callbacks.insert(callbacks.index(quantization) + 1, keep)
        if not sys.stderr.isatty():
            callbacks.append(StepLines())
        return trainer


class RecipeCLI(KurtailCLI):
    """Reads a recipe without making anything of it: sizes would come from the weights."""

    def instantiate_classes(self) -> None:
        """Leave it at the settings."""


def command_line(kind: type[KurtailCLI], program: str, arguments: list[str], run: bool = True) -> KurtailCLI:
    """Parse a recipe and its overrides as a Lightning CLI of a kind; runs the verb unless told not to."""
    sys.argv = [program, *prepared(arguments)]  # LightningCLI reads it, and warns when it is given both.
    # Lightning advertises its other products at each start, and calls something that torch has deprecated.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Fixed rotations have no optimizer, and say so by their class.
    warnings.filterwarnings("ignore", message=".*configure_optimizers. returned .None.")
    # The network that SpinQuant learns through does not train.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        logging.getLogger("kurtail_pl").setLevel(logging.ERROR)  # The first process speaks for all.
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
        run=run,
    )


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not any(product in str(record.msg) for product in ("litlogger", "litmodels"))


def fit(arguments: list[str]) -> None:
    """Capture, learn rotations, fuse, quantize and evaluate, as a recipe says."""
    command_line(KurtailCLI, "kurtail", ["fit", *arguments])


def validate(arguments: list[str]) -> None:
    """Report the kurtosis of a checkpoint's rotations."""
    command_line(KurtailCLI, "kurtail", ["validate", *arguments])
