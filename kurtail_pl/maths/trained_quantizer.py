"""A quantizer of what learns: its gradients know how the range, and with it the rounding error, moves with the values.

`fake_quantize` takes the grid as given, which is right where a clip learns and its inputs do not. A map that flattens
its outputs learns from nothing else than the range.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantizer, dynamic_grid, split_groups
from kurtail_pl.maths.rounding import rounded


@dataclass(frozen=True, eq=False)
class TrainedQuantizer(Quantizer):
    """Gives what the others give, bit for bit; only the rounding passes gradients straight through."""

    def fake(self, x: Tensor, grid: Grid | None) -> Tensor:
        """Values ``[..., n]``, on a grid of their own."""
        grouped = split_groups(x, self.group_size)
        scale, zero_point = dynamic_grid(grouped, self) if grid is None else grid
        scale, zero = scale.unsqueeze(-1), 0 if zero_point is None else zero_point.detach().unsqueeze(-1)
        steps = grouped / scale
        # A sum of a number and what rounding adds to it is exact.
        codes = steps + (rounded(steps.detach().clone()) - steps.detach()) + zero
        return ((codes.clamp(*self.code_range) - zero) * scale).reshape(x.shape)
