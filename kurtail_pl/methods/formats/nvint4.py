"""NVINT4: integers with the scales of NVFP4, which suit rotated weights better (arXiv 2510.25602)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantized, dequantize
from kurtail_pl.methods.format import in_scales
from kurtail_pl.methods.formats.blocks import InE4M3


@dataclass(frozen=True)
class NVINT4(InE4M3):
    """Integers from -8 to 7 in blocks of 16 inputs with an E4M3 scale: 4.5 bits a weight.

    One power of two scales the whole weight beside.
    """

    label = "nvint4"
    top = 7
    even = True
    fits_scales = False

    def sentence(self) -> str:
        """In words."""
        return "NVINT4: 4-bit integers in blocks of 16, their scales in E4M3"

    def storable(self, grid: Grid) -> Grid:
        """Scales in E4M3."""
        return grid._replace(scale=self.project(grid.scale))

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Half to even."""
        codes = in_scales(x, scale).round_().clamp_(*self.code_range)
        return codes, codes * scale

    def values(self, quantized: Quantized) -> Tensor:
        """Codes times scales."""
        return dequantize(quantized)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -8, 7

    code_dtype = torch.int8
