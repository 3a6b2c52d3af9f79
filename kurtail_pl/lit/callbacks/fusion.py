"""Fuse the rotations into the weights."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.lit.callbacks.order import CheckedCallback
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.fusion.scales import ScaleSpec, scale_windows
from kurtail_pl.stages.fusion.signs import SignSpec, sign_windows
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.rotation_file import FILE, read_rotations

FUSED = "fused"


class Fusion(CheckedCallback):
    """Writes the rotated float32 model to the folder `fused` under the trainer's root, replacing an older one.

    Args:
        scales: channels that are scaled; null for none.
        signs: of R4 and R5, chosen among several draws; null takes those of the module's seed.
    """

    def __init__(self, scales: ScaleSpec | None = None, signs: SignSpec | None = None) -> None:
        self.scales, self.signs = scales, signs

    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Refuse scales that the model cannot have, and texts too short."""
        if self.scales is not None:
            scale_windows(data.checkpoint, self.scales)
        if self.signs is not None:
            sign_windows(data.checkpoint, self.signs)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the written rotations and fuse them."""
        root = Path(trainer.default_root_dir)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, RotationModule)
        rotations = read_rotations(root / FILE)
        fuse(
            data.checkpoint,
            rotations,
            pl_module.method,
            root / FUSED,
            overwrite=True,
            device=data.compute.device,
            scales=self.scales,
            signs=self.signs,
        )
