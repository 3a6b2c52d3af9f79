"""What is refused before anything runs: trainer settings that lead to nothing, recipes too large for this machine."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks import Evaluation, Fusion, WeightQuantization
from kurtail_pl.lit.callbacks.order import CheckedCallback, callback_of
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.meter import device_memory, free_memory, resident_memory
from kurtail_pl.stages.planning.plan import plan
from kurtail_pl.stages.planning.run import StagePlan
from kurtail_pl.stages.planning.table import misfits
from kurtail_pl.storage.files import free_disk, refuse_existing


def require_sensible(trainer: L.Trainer) -> None:
    """Raise ConfigError for settings of a trainer that lead to nothing, or fail only after the training."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError("trainer.fast_dev_run would write an artefact of nothing; try the recipe smoke instead")
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
        raise ConfigError(f"the recipe has {twice} twice; keep one")


def planned(trainer: L.Trainer, data: StoredModel) -> list[StagePlan]:
    """What each stage of a recipe takes; nothing where a trainer has none of its last stages."""
    quantization, evaluation = callback_of(trainer, WeightQuantization), callback_of(trainer, Evaluation)
    if quantization is None or evaluation is None:
        return []
    fusion = callback_of(trainer, Fusion) or Fusion()
    return plan(
        data.checkpoint.config, data.capture_spec, data.learning(), quantization.spec, evaluation.text,
        resident_memory(), data.compute, fusion.scales, fusion.signs,
    )  # fmt: skip


def require_possible(trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
    """Let the callbacks refuse what would fail after capture and training.

    Raises:
        ConfigError: also when a recipe does not fit this machine.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CheckedCallback):
            callback.check(trainer, module, data)
    data.compute.torch_device  # noqa: B018, refuses a device that is not there
    found = misfits(planned(trainer, data), free_memory(), free_disk(data.store_folder), device_memory())
    if found:
        raise ConfigError(f"the recipe does not fit this machine: {'; '.join(found)}")
