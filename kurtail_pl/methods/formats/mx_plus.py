"""MX+ (arXiv 2510.14557): MXFP4 whose largest number of a block has a finer mantissa in place of its exponent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.maths.gptq import OnGrid
from kurtail_pl.maths.quantizers import Quantized, split_groups
from kurtail_pl.methods.format import Buffer, Tensors, in_scales
from kurtail_pl.methods.formats.blocks import InE8M0
from kurtail_pl.methods.formats.fp4 import E2M1, LEVELS

SMALLEST, STEP = 4.0, 0.5
"""The largest number of a block has the top exponent, by the rule for scales, and three bits of mantissa: 4 to 7.5."""
TOPS = torch.cat([sign * (SMALLEST + STEP * torch.arange(8, dtype=torch.float64)) for sign in (1, -1)])
"""What its codes stand for."""


@dataclass(frozen=True)
class MXFP4Plus(E2M1, InE8M0):
    """MXFP4 and a byte for each block that says which number is its largest: 4.5 bits a weight.

    That number's levels are 4, 4.5 ... 7.5 times the scale, where MXFP4 has 4 and 6; all others are as in MXFP4. A grid
    has the largest numbers' places in their blocks where others have zero points. Rounders that move a weight leave
    its place as it is.
    """

    label = "mxfp4+"

    def sentence(self) -> str:
        """In words."""
        return "MXFP4+: 4-bit floating point in blocks of 32, the largest of each with a finer mantissa"

    def marks(self, grouped: Tensor) -> Tensor:
        """The place of each block's largest number, the first of several; 32, which is none, in a block of zeros."""
        largest, place = grouped.abs().max(-1)
        return torch.where(largest > 0, place, self.group_size).to(grouped.dtype)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of whole blocks ``[..., 32]``; the largest numbers' places stand for zero points."""
        assert zero_point is not None
        return self._rounded(x, scale, zero_point == torch.arange(self.group_size, device=x.device))

    def in_column(self, column: int) -> OnGrid:
        """Of numbers ``[out]`` that have this place in their rows."""
        place = column % self.group_size

        def rounded(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
            assert zero_point is not None
            return self._rounded(x, scale, zero_point.eq(place))

        return rounded

    def _rounded(self, x: Tensor, scale: Tensor, is_top: Tensor) -> tuple[Tensor, Tensor]:
        codes, values = super().on_grid(x, scale, None)
        relative = in_scales(x, scale)
        mantissa = ((relative.abs() - SMALLEST) / STEP).round_().clamp_(0, 7)
        tops = (mantissa + 8 * (relative < 0)).to(codes.dtype)
        codes = torch.where(is_top, tops, codes)
        return codes, torch.where(is_top, TOPS.to(scale)[tops] * scale, values)

    def values(self, quantized: Quantized) -> Tensor:
        """Levels times scales."""
        codes, (scale, place) = quantized
        assert place is not None
        grouped = split_groups(codes.int(), self.group_size)
        is_top = place.unsqueeze(-1) == torch.arange(self.group_size, device=codes.device)
        levels = torch.where(is_top, TOPS.to(scale)[grouped], LEVELS.to(scale)[grouped])
        return (levels * scale.unsqueeze(-1)).reshape(codes.shape)

    def pack(self, quantized: Quantized) -> Tensors:
        """Those of MXFP4, and the places."""
        assert quantized.grid.zero_point is not None
        return {**super().pack(quantized), "top": quantized.grid.zero_point.to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Places in the scales' type."""
        codes, grid = super().unpack(tensors, columns)
        return Quantized(codes, grid._replace(zero_point=tensors["top"].to(grid.scale.dtype)))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, scale and top."""
        return {**super().buffers(rows, columns), "top": self.scale_buffer(rows, columns, torch.uint8)}
