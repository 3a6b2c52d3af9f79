"""Checkpoints of the training, from which an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from kurtail_pl.errors import ConfigError


class Checkpoints(ModelCheckpoint):
    """Writes `checkpoints/last.ckpt` under the trainer's root, also when an error or Ctrl-C ends the training.

    Args:
        every_n_train_steps: steps between two checkpoints.

    Raises:
        ConfigError: for fewer than 1.
    """

    def __init__(self, every_n_train_steps: int = 10) -> None:
        if every_n_train_steps < 1:
            raise ConfigError(f"checkpoints.every_n_train_steps is {every_n_train_steps}; give a positive number")
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the folder; the trainer knows its root by now."""
        self.dirpath = str(checkpoint_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save again when the training was stopped early: one saved before that does not know, and would go on."""
        super().on_train_end(trainer, pl_module)
        if trainer.should_stop:
            trainer.save_checkpoint(self.last_model_path)


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Where the checkpoints of a trainer go."""
    return Path(trainer.default_root_dir) / "checkpoints"
