"""Fuse the rotations into the weights."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks.order import CheckedCallback
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.fusion.scales import ScaleSpec, scale_windows
from kurtail_pl.stages.fusion.signs import SignSpec, sign_windows
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.rotation_file import FILE, read_rotations
from kurtail_pl.surgery.rotations import Online

FUSED = "fused"


class Fusion(CheckedCallback):
    """Writes the rotated float32 model to the folder `fused` under the trainer's root, replacing an older one.

    Args:
        scales: channels that are scaled; null for none.
        signs: of R4 and R5, chosen among several draws; null takes those of the module's seed.
        online: the rotations that act at run time, of query_key (R3), attention_output (R4) and mlp_hidden (R5); null
            for all three. Leave out those that the runtime cannot do.

    Raises:
        ConfigError: when signs are to be chosen of rotations that are left out.
    """

    def __init__(
        self, scales: ScaleSpec | None = None, signs: SignSpec | None = None, online: list[Online] | None = None
    ) -> None:
        if signs is not None and online is not None and not {"attention_output", "mlp_hidden"} & set(online):
            raise ConfigError(
                f"fusion.signs chooses signs of R4 and R5, and fusion.online is {online}; write fusion.signs: "
                "null, or keep attention_output or mlp_hidden"
            )
        self.scales, self.signs, self.online = scales, signs, online

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
        rotations = read_rotations(root / FILE).keeping(self.online)
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
