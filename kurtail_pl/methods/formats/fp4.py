"""Four-bit floating point in small blocks: MXFP4 (OCP Microscaling Formats 1.0) and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.methods.format import in_scales, levels_in_scales
from kurtail_pl.methods.formats.blocks import Blocks, InE4M3, InE8M0

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of E2M1, by the low three bits of a code; the fourth is the sign."""
LEVELS = torch.tensor([*MAGNITUDES, *(-level for level in MAGNITUDES)], dtype=torch.float64)
"""By their codes; zero has two."""


class E2M1(Blocks):
    """Levels of four-bit floating point."""

    top = 6

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ties go to the even mantissa; beyond 6 is 6."""
        relative = in_scales(x, scale)
        levels = torch.tensor(MAGNITUDES, dtype=scale.dtype, device=scale.device)
        borders, size = (levels[1:] + levels[:-1]) / 2, relative.abs()
        below, above = torch.bucketize(size, borders), torch.bucketize(size, borders, right=True)
        code = torch.where(below % 2 == 0, below, above)
        sign = (relative < 0) & (code > 0)
        return code + 8 * sign, torch.where(sign, -levels[code], levels[code]) * scale

    def values(self, quantized: Quantized) -> Tensor:
        """Levels times scales."""
        return levels_in_scales(LEVELS, quantized, self.group_size)

    code_dtype = torch.uint8


@dataclass(frozen=True)
class MXFP4(E2M1, InE8M0):
    """Blocks of 32 inputs with a power of two as their scale: 4.25 bits a weight."""

    label = "mxfp4"

    def sentence(self) -> str:
        """In words."""
        return "MXFP4: 4-bit floating point in blocks of 32, their scales powers of two"


@dataclass(frozen=True)
class NVFP4(E2M1, InE4M3):
    """Blocks of 16 inputs with an E4M3 scale, and one power of two for the whole weight: 4.5 bits a weight."""

    label = "nvfp4"

    def sentence(self) -> str:
        """In words."""
        return "NVFP4: 4-bit floating point in blocks of 16, their scales in E4M3"
