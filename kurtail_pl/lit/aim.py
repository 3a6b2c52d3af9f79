"""What a recipe makes of a model: what a module that learns rotations for it has to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import Online
from kurtail_pl.surgery.rotations import BlockSize


@dataclass(frozen=True)
class Aim:
    """Settings of other sections of a recipe, which `kurtail fit` puts together; nobody gives them twice.

    Args:
        scheme: what the artefact will have quantized (`quantization.scheme`).
        online: the rotations that act at run time (`fusion.online`).
        block_size: of R4 and R5 (`fusion.block_size`).
    """

    scheme: Scheme = field(default_factory=Scheme)
    online: list[Online] | None = None
    block_size: BlockSize | None = None

    @property
    def groups(self) -> dict[str, int | None]:
        """Sizes of the groups of inputs that share a scale, by what they are of; None for all inputs."""
        parts = {"weights": self.scheme.weights, "activations": self.scheme.activations}
        return {name: part.group_size for name, part in parts.items() if part is not None}
