"""Grids that formats with scales of 16 bits hold as they are: a scale and, beside a zero point, the smallest value."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid

SIGNIFICANT = 11
"""Bits of a float16."""
SMALLEST, LARGEST = 2.0**-24, 2.0**12
"""Of scales: float16 has no smaller number, and fifteen of the largest are below its largest."""


def half_grid(grid: Grid) -> Grid:
    """The nearest scales that float16 holds, and with a zero point z those whose product ``z scale`` it holds too.

    Levels are then ``scale code - z scale`` of two float16 numbers, without an error. z times a scale of n significant
    bits has n more than z's odd part takes; none, where z is a power of two.

    Args:
        grid: of scales above zero, float32 or wider; zero points up to 15, which stay what they are.
    """
    scale, zero_point = grid
    bits = torch.full_like(scale, SIGNIFICANT, dtype=torch.int32)
    if zero_point is not None:
        bits = bits - _odd_bits(zero_point)
    mantissa, _ = torch.frexp(scale)
    # Powers of two, exactly: the unit of the mantissa, and what one more in the last bit is worth.
    step = (scale / mantissa / (1 << bits)).clamp(min=SMALLEST)
    return Grid((torch.round(scale / step) * step).clamp(SMALLEST, LARGEST), zero_point)


def _odd_bits(zero_point: Tensor) -> Tensor:
    """Bits of the odd part of integers, 0 where it is 1 or there is none."""
    whole = zero_point.to(torch.int32)
    odd = torch.where(whole > 0, whole // (whole & -whole).clamp(min=1), 0)
    _, bits = torch.frexp(odd.float())
    return torch.where(odd > 1, bits, 0)
