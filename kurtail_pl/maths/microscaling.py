"""Numbers of four and eight bits: E2M1 levels, scales in E8M0 and E4M3 (OCP Microscaling Formats 1.0, section 5)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kurtail_pl.maths.rounding import rounded

Levels = Literal["integer", "e2m1"]
Scales = Literal["float32", "e8m0", "e4m3"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
SCALES: tuple[Scales, ...] = get_args(Scales)
LARGEST_E2M1 = 12
"""Its largest level, 6, in halves, of which all of them are whole numbers: 0, 1, 2, 3, 4, 6, 8, 12."""
LARGEST_E4M3, SMALLEST_E4M3 = 448.0, 2.0**-9
E8M0_BIAS = 127


def e2m1_halves(x: Tensor) -> Tensor:
    """Nearest levels of E2M1 in halves, of numbers in halves; ties go to the even mantissa, beyond 12 is 12."""
    size = x.abs()
    step = 1 + (size > 4).to(x.dtype) + 2 * (size > 8).to(x.dtype)
    return rounded(x / step).mul_(step).clamp_(-LARGEST_E2M1, LARGEST_E2M1)


def e8m0_scales(limit: Tensor, largest_code: int) -> Tensor:
    """Powers of two, by OCP's rule: that of the largest magnitude, over that of the largest code (section 6.3).

    Magnitudes above the largest code are then clipped to it: for E2M1 those of 6 to 8 scales.

    Args:
        limit: largest magnitude of each block, ``[...]``.
        largest_code: that there is.

    Returns:
        Scales ``[...]`` from 2^-127 to 2^127; 1 for a block of zeros.
    """
    exponent = torch.frexp(limit).exponent - largest_code.bit_length()
    scale = torch.exp2(exponent.clamp(-E8M0_BIAS, E8M0_BIAS).to(limit.dtype))
    return torch.where(limit > 0, scale, torch.ones_like(scale))


def e4m3_scales(scale: Tensor, whole: Tensor) -> Tensor:
    """The nearest numbers of E4M3, times what they share; a block of zeros has the smallest.

    Args:
        scale: of each block, ``[...]``.
        whole: see `whole_scale`; broadcast.
    """
    blocks = (scale / whole).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return blocks.to(scale.dtype) * whole


def whole_scale(largest: Tensor) -> Tensor:
    """The power of two that brings the largest scale ``[...]`` to at most 448 and above 224; 1 for zero."""
    exponent = torch.ceil(torch.log2(largest / LARGEST_E4M3))
    return torch.where(largest > 0, torch.exp2(exponent), torch.ones_like(largest))


def dynamic_scales(limit: Tensor, largest_code: int, scales: Scales) -> Tensor:
    """Scales of a token's groups by which their largest magnitudes become the largest code.

    Args:
        limit: those magnitudes, ``[..., groups]``.
        largest_code: that there is.
        scales: ``float32``, any number; ``e8m0``, powers of two; ``e4m3``, numbers of E4M3 times a power of two that
            the groups of a token share (NVFP4 has one for all tokens, which is found by calibration).

    Returns:
        ``[..., groups]``; any positive number for a group of zeros.
    """
    if scales == "e8m0":
        return e8m0_scales(limit, largest_code)
    if scales == "float32":
        scale = limit / largest_code
        return torch.where(scale > 0, scale, torch.ones_like(scale))
    # Half precision does not hold what is between.
    wide = limit.to(torch.promote_types(limit.dtype, torch.float32)) / largest_code
    return e4m3_scales(wide, whole_scale(wide.amax(-1, keepdim=True))).to(limit.dtype)
