"""Weights in groups whose scales are integers times the row's own: QServe's progressive groups (arXiv 2405.04532)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, dequantize, split_groups
from kurtail_pl.maths.weights import ERROR_NORM, search_grid
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Format, Tensors
from kurtail_pl.methods.formats.uniform import SEARCH_PASSES

CODES = Quantizer(4, symmetric=False)
"""In steps of their group."""
INT8 = 127
"""Largest int8 whose negative is one too."""
REACH = 120
"""Steps of its row that the group which reaches furthest spans. Scales rounded to whole steps then never leave int8: m
times the nearest integer to ``REACH / m`` is at most 127 for every m from 8 to 15, the codes on the longer side of a
zero point."""
LARGEST = 15
"""Of the integers that groups have: a zero point leaves eight codes on one side at least, and eight times 16 is beyond
int8."""
SMALLEST = 2.0**-100
"""A row's own scale is at least that, in a row of zeros, too."""
DIGITS = 8
"""Bits of a bfloat16: times an integer of four bits and a code of four it is exact in float32."""


@dataclass(frozen=True)
class Progressive(Format):
    """Four-bit codes on two levels of scales: ``(code - zero_point) group_scale row_scale``, the first two integers.

    What a code stands for in steps of its row, ``(code - zero_point) group_scale``, is an int8 from -127 to 127, which
    products with int8 inputs add up in int32; a float multiplies only the sum. Every product of the three is exact in
    float32, so that both ways to read a weight agree bit for bit.

    Args:
        group_size: inputs that share an integer scale and a zero point; None for all of an output channel.
    """

    group_size: int | None = 128

    bits = 4
    label = "progressive"
    even = True
    fits_scales = False

    def sentence(self) -> str:
        """Both levels."""
        return f"4-bit codes on two levels of scales: an integer {self.groups}, times a number per output channel"

    def cost(self, sizes: Sizes) -> Cost:
        """The search of a plain grid, and one through the integers."""
        return Cost(passes=SEARCH_PASSES * (1 + LARGEST / 80) * float(sizes.stack))

    def grid(self, weight: Tensor) -> Grid:
        """Rows' scales by the search of a plain grid; of each group the integer with the least error of that kind."""
        searched = search_grid(weight, replace(CODES, group_size=self.group_size))
        grouped = split_groups(weight if weight.dtype == torch.float64 else weight.float(), self.group_size)
        empty = grouped.abs().amax(-1) == 0
        row = _row_scale(searched._replace(scale=searched.scale.masked_fill(empty, 0)))
        zero_point = _zero_point(searched).masked_fill(empty, LARGEST // 2)
        best_error, best = torch.full_like(searched.scale, torch.inf), row.expand_as(searched.scale)
        for integer in range(1, LARGEST + 1):
            scale = (integer * row).expand_as(best)
            _, values = self.on_grid(grouped, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
            error = values.sub_(grouped).abs_().pow_(ERROR_NORM).sum(-1)
            better = (error < best_error) & (integer * _longer_side(zero_point) <= INT8)
            best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
        return Grid(best.contiguous(), zero_point)

    def storable(self, grid: Grid) -> Grid:
        """Itself where it can be stored; else rows' scales by what reaches furthest, and the nearest integers."""
        whole = _whole_rows(grid.scale)
        furthest = (grid.scale * _longer_side(_zero_point(grid))).amax(-1, keepdim=True)
        row = torch.where((whole > 0) & (furthest <= INT8 * whole), whole, _row_scale(grid))
        return grid._replace(scale=(grid.scale / row).round_().clamp_(min=1) * row)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Half to even."""
        return CODES.on_grid(x, scale, zero_point)

    def values(self, quantized: Quantized) -> Tensor:
        """``(codes - zero_point) * scale``."""
        return dequantize(quantized)

    code_dtype = torch.uint8

    def pack(self, quantized: Quantized) -> Tensors:
        """Codes, row_scale in bfloat16, and, of each group, group_scale and zero_point in uint8."""
        codes, (scale, zero_point) = quantized
        assert zero_point is not None
        row = _whole_rows(scale)
        return {
            "codes": self.packed(codes),
            "row_scale": row.to(torch.bfloat16),
            "group_scale": (scale / row).to(torch.uint8),
            "zero_point": zero_point.to(torch.uint8),
        }

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Products of both scales, in float32."""
        scale = tensors["row_scale"].float() * tensors["group_scale"].float()
        return Quantized(self.unpacked(tensors["codes"], columns), Grid(scale, tensors["zero_point"].float()))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, row_scale, group_scale and zero_point."""
        return {
            "codes": self.code_buffer(rows, columns),
            "row_scale": Buffer((rows, 1), torch.bfloat16),
            "group_scale": self.scale_buffer(rows, columns, torch.uint8),
            "zero_point": self.scale_buffer(rows, columns, torch.uint8),
        }


def _zero_point(grid: Grid) -> Tensor:
    assert grid.zero_point is not None
    return grid.zero_point


def _longer_side(zero_point: Tensor) -> Tensor:
    """Codes between a zero point and the end that is further from it."""
    return torch.maximum(zero_point, LARGEST - zero_point)


def _row_scale(grid: Grid) -> Tensor:
    """The least bfloat16 ``[out, 1]`` in whose steps no group ``[out, groups]`` of a row reaches further than REACH."""
    limit = (grid.scale * _longer_side(_zero_point(grid))).amax(-1, keepdim=True) / REACH
    mantissa, exponent = torch.frexp(limit.clamp(min=SMALLEST))
    return torch.ldexp(torch.ceil(mantissa * (1 << DIGITS)) / (1 << DIGITS), exponent)


def _whole_rows(scale: Tensor) -> Tensor:
    """The largest bfloat16 ``[out, 1]`` of which all scales of a row are multiples, up to LARGEST; 0 without one."""
    largest, row = scale.amax(-1, keepdim=True), torch.zeros_like(scale[:, :1])
    for integer in range(LARGEST, 0, -1):
        each = largest / integer
        multiples = ((scale / each).round_() * each == scale).all(-1, keepdim=True)
        row = torch.where(multiples & (each.to(torch.bfloat16) == each), each, row)
    return row
