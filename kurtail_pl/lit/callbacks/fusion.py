"""Fuse the rotations into the weights."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks.order import CheckedCallback
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.methods.target import Online
from kurtail_pl.stages.fusion.scales import ScaleSpec, scale_windows
from kurtail_pl.stages.fusion.signs import SignSpec, sign_windows
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.rotation_file import FILE, read_rotations
from kurtail_pl.surgery.rotations import BlockSize, require_blocks

FUSED = "fused"


class Fusion(CheckedCallback):
    """Writes the rotated float32 model to the folder `fused` under the trainer's root, replacing an older one.

    Args:
        scales: channels that are scaled; null for none.
        signs: of R4 and R5, chosen among several draws; null takes those of the module's seed.
        online: the rotations that act at run time, of query_key (R3), attention_output (R4) and mlp_hidden (R5); null
            for all three. Leave out those that the runtime cannot do.
        block_size: R4 and R5 mix so many neighbouring channels, a power of two; ``widest`` for the largest that divides
            each width, null for all channels. Blocks cost less at run time, and vLLM has a fast kernel for them; their
            signs are fused.

    Raises:
        ConfigError: when signs are to be chosen, or blocks made, of rotations that are left out.
    """

    def __init__(
        self,
        scales: ScaleSpec | None = None,
        signs: SignSpec | None = None,
        online: list[Online] | None = None,
        block_size: BlockSize | None = None,
    ) -> None:
        of = {"signs": ("chooses signs", signs), "block_size": ("is the size", block_size)}
        for name, (does, value) in of.items():
            if value is not None and online is not None and not {"attention_output", "mlp_hidden"} & set(online):
                raise ConfigError(
                    f"fusion.{name} {does} of R4 and R5, and fusion.online is {online}; write fusion.{name}: "
                    "null, or keep attention_output or mlp_hidden"
                )
        self.scales, self.signs, self.online, self.block_size = scales, signs, online, block_size

    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Refuse scales, orders and blocks that the model cannot have, and texts too short."""
        if self.block_size is not None:
            require_blocks(data.checkpoint.config, self.block_size)
        if self.scales is not None:
            scale_windows(data.checkpoint, self.scales)
            if self.scales.reorder:
                self.scales.require_order(module.rotations(data.checkpoint.config).keeping(self.online))
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
