"""Write the learned rotations when training ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L

from kurtail_pl.lit.datamodule import ActivationDataModule
from kurtail_pl.lit.module import RotationModule
from kurtail_pl.stages.meter import Meter
from kurtail_pl.storage.files import write_json
from kurtail_pl.storage.rotation_file import FILE, write_rotations
from kurtail_pl.surgery.rotations import random_rotations

COST = "learn.json"


class RotationWriter(L.Callback):
    """Writes `rotations.safetensors` (learned R1 and R2, random online R3 to R5) and what learning them cost.

    `last.ckpt` may be older than the end of training; this file never is.
    """

    def __init__(self) -> None:
        self._meter = Meter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._meter.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock and write."""
        self._meter.__exit__(None, None, None)
        assert isinstance(pl_module, RotationModule)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, ActivationDataModule)
        start = random_rotations(datamodule.checkpoint.config, pl_module.rotation_seed)
        folder = Path(trainer.default_root_dir)
        residual, value = pl_module.learned()
        write_rotations(folder / FILE, replace(start, residual=residual, value=value))
        write_json(folder / COST, self._meter.to_dict())
