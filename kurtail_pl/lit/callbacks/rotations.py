"""Write the rotations when training ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.errors import CheckpointError
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.rotation_file import FILE, read_rotations, write_rotations


class RotationWriter(L.Callback):
    """Writes `rotations.safetensors`: R1 and R2, the online R3 to R5, and all that led to them.

    `last.ckpt` may be older than the end of training; this file never is.
    """

    def __init__(self) -> None:
        self._meter = Meter()

    def state_dict(self) -> dict[str, Any]:
        """What the training cost so far, for the checkpoint."""
        return self._meter.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add what the part before the checkpoint cost."""
        self._meter = Meter(earlier=state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._meter.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._meter.__exit__(None, None, None)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, also when training had ended before an interruption and there was nothing left of it to do."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, RotationModule)
        assert isinstance(data, StoredModel)
        path = Path(trainer.default_root_dir) / FILE
        origin = {
            **pl_module.settings(),
            **pl_module.trainer_settings(),
            "steps": trainer.global_step,
            "data": data.settings(),
            "versions": versions(),
        }
        if not _stands(path, origin):
            rotations = replace(
                pl_module.rotations(data.checkpoint.config), origin={**origin, "cost": self._meter.to_dict()}
            )
            write_rotations(path, rotations)


def _stands(path: Path, origin: dict[str, Any]) -> bool:
    """Whether rotations that were learned so were written already.

    On another number of threads their last bits would come out differently, and what was made of them would not fit.
    """
    if not path.is_file():
        return False
    try:
        found = read_rotations(path).origin
    except CheckpointError:
        return False
    wanted: dict[str, Any] = json.loads(json.dumps(origin))
    return {name: value for name, value in found.items() if name != "cost"} == wanted
