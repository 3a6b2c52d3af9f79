"""QuaRot and no rotation at all: nothing is learned, the callbacks do all the work."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from transformers import PretrainedConfig

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.stages.fusion.stage import UNROTATED
from kurtail_pl.surgery.rotations import Rotations


class FixedRotations(RotationModule):
    """Random Hadamards (QuaRot, arXiv 2404.00456), or none; its trainer takes no steps (`max_epochs: 0`).

    Args:
        sizes: see `RotationModule`.
        hadamard: random Hadamards for R1 to R5; false leaves the model unrotated.
        rotation_seed: decides the random Hadamards.
        aim: what is made with them.
        block: see `RotationModule`.
        name: in artefacts and tables; None for ``quarot``, or ``none`` without rotations.

    Raises:
        ConfigError: when the trainer would take steps, or a block is given and no Hadamards are asked for.
    """

    learns = False

    def __init__(
        self,
        sizes: ModelSizes,
        hadamard: bool = True,
        rotation_seed: int = 0,
        aim: Aim | None = None,
        block: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(sizes, rotation_seed, aim=aim, block=block)
        if block is not None and not hadamard:
            raise ConfigError(f"block is {block} and hadamard is false, which rotates nothing; leave one of them out")
        self.rotates = hadamard
        self.method = name or self.kind

    @property
    def kind(self) -> str:
        """What the rotations are, whatever is made with them is called."""
        return "quarot" if self.rotates else UNROTATED

    def setup(self, stage: str) -> None:
        """Refuse to train what does not learn."""
        super().setup(stage)
        if stage == "fit" and self.trainer.max_epochs != 0:
            raise ConfigError(
                f"trainer.max_epochs is {self.trainer.max_epochs}, but fixed rotations do not learn; set it to 0"
            )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: Lightning only asks that there be one."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """None: nothing learns."""
        return None

    def settings(self) -> dict[str, Any]:
        """What they are and what draws the Hadamards."""
        return {"method": self.kind, "seed": self.rotation_seed, **self.blocks()}

    def rotations(self, config: PretrainedConfig) -> Rotations:
        """The random Hadamards, or no rotations."""
        return self.random_rotations(config) if self.rotates else Rotations()
