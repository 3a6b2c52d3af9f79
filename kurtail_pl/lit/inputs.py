"""R1 of families whose residual stream cannot be turned: each block input has one of its own, which acts online."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_transform
from kurtail_pl.maths.orthogonal import nearest_orthogonal
from kurtail_pl.surgery.rotations import random_inputs


class InputRotations(nn.Module):
    """A Kronecker product of two orthogonal matrices for each block input; whole matrices would cost too much online.

    Args:
        layers: of the model.
        hidden_size: of the residual stream.
        seed: of the random Hadamards that they start from.
        block: see `RotationModule`.
    """

    def __init__(self, layers: int, hidden_size: int, seed: int, block: int | None) -> None:
        super().__init__()
        self._start = random_inputs(layers, hidden_size, seed, block)
        self.left = nn.Parameter(self._start.left.float())
        self.right = nn.Parameter(self._start.right.float())

    def turned(self, rows: Tensor, site: int) -> Tensor:
        """Rows ``[..., hidden]`` of one block input, turned by its R1."""
        return hadamard_transform(rows, replace(self._start, left=self.left[site], right=self.right[site]))

    def learned(self) -> HadamardFactors:
        """As learned, re-orthogonalised, float64 on the CPU."""
        left, right = (nearest_orthogonal(factor.detach()).cpu() for factor in self.parameters())
        return replace(self._start, left=left, right=right, construction=f"learned {len(left[0])} x {len(right[0])}")
