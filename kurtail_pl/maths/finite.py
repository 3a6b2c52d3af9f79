"""Whether values are numbers, and whether float16 holds them."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOSS = 2.0**-9
"""Of a tensor's norm that may be lost in float16: what bfloat16, whose range is float32's, loses at most."""
AT_ONCE = 1 << 22
"""Values that are compared at a time: in float64, all of an embedding would be the largest thing in memory."""


def is_finite(x: Tensor) -> bool:
    """Whether no value is infinite or not a number; codes never are. One pass that makes no tensor: 16 GB/s a core."""
    if not x.is_floating_point() or not x.numel():
        return True
    # The extremes of types of one byte are not implemented.
    ends = torch.aminmax(x if x.dtype.itemsize > 1 else x.half())
    return bool(ends.min.isfinite() & ends.max.isfinite())


def half_or_float(x: Tensor) -> Tensor:
    """Values in float16 where it holds them as exactly as bfloat16 would at worst, in float32 where it does not.

    It does not where a value is beyond 65504, or where so many are near its smallest ones, 6e-8 apart, that the tensor
    loses more than `LARGEST_LOSS` of its norm. A few small values among large ones lose nothing that counts.
    """
    half = x.half()
    if not is_finite(half):
        return x.float()
    # A value loses at most 2^-11 of itself, or 2^-25 where it is below float16's usual numbers. If all were, and it is
    # still little beside the norm, no value has to be looked at again.
    if 2.0**-25 * x.numel() ** 0.5 <= LARGEST_LOSS / 2 * float(torch.linalg.vector_norm(x)):
        return half
    return half if _loss(x, half) <= LARGEST_LOSS else x.float()


def _loss(x: Tensor, rounded: Tensor) -> float:
    """Norm of what rounding took, over the norm of x; 0 where x is all zeros."""
    lost, size = 0.0, 0.0
    parts = (torch.split(values.flatten(), AT_ONCE) for values in (x, rounded))
    for values, near in zip(*parts, strict=True):
        exact = values.double()
        size += float(exact.square().sum())
        lost += float((near.double() - exact).square().sum())
    return (lost / size) ** 0.5 if size else 0.0
