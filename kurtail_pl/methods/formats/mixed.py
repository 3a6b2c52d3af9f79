"""2 and 4 bits in one weight, by groups of columns (2/4/16 bits, arXiv 2311.16442)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.allocation import allocate
from kurtail_pl.maths.gptq import OnGrid
from kurtail_pl.maths.packing import pack_codes, stored_bits, unpack_codes
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, dequantize, split_groups
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Format, Tensors
from kurtail_pl.methods.formats.uniform import SEARCH_PASSES

NARROW, WIDE = 2, 4
"""Bits of groups."""
DIGITS = 8
"""Bits of a scale, in steps of its row."""
BIAS = 127
"""Added to the exponent of a row's step."""
SMALLEST = 2.0**-100
"""A row's largest scale is at least that, in a row of zeros, too."""


@dataclass(frozen=True)
class Mixed(Format):
    """Groups of columns in 2 bits, and those that rounding hurts most in 4, the same ones in all rows.

    Which these are says the square error of rounding to nearest in 2 and in 4 bits, each input counted by the diagonal
    of the Hessian where there is one. Each row has a scale and a zero point for each group. Scales are rounded in turn:
    to integers of 8 bits, times a power of two for each row.

    Args:
        average: bits of a code over all groups, 2 to 4.
        group_size: inputs that share a scale; a multiple of 4, so that codes fill bytes.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    average: float = 2.2
    group_size: int = 32

    bits = WIDE
    label = "mixed"
    fits_scales = False
    code_dtype = torch.uint8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not NARROW <= self.average <= WIDE:
            raise ConfigError(f"weights.average is {self.average}; groups have {NARROW} or {WIDE} bits: give 2 to 4")
        if self.group_size < 1 or self.group_size % 4:
            raise ConfigError(
                f"weights.group_size is {self.group_size}; give a multiple of 4, as four codes fill a byte"
            )

    @property
    def average_bits(self) -> float:
        """As asked for."""
        return self.average

    def sentence(self) -> str:
        """Bits, groups and scales."""
        return (
            f"2-bit and 4-bit integers by groups of columns, {self.average:g} on average, {self.groups}, 8-bit scales"
        )

    def cost(self, sizes: Sizes) -> Cost:
        """The searches of both grids, and their rounding."""
        return Cost(copies=4, passes=2.1 * SEARCH_PASSES * float(sizes.stack))

    def fitted(self, weight: Tensor, hessian: Tensor | None) -> Format:
        """With the widths of its groups."""
        exact = weight if weight.dtype == torch.float64 else weight.float()
        counts = exact.new_ones(exact.shape[1]) if hessian is None else hessian.diagonal().to(exact)
        grids, costs = [], []
        for bits in (NARROW, WIDE):
            plain = Quantizer(bits, symmetric=False, group_size=self.group_size)
            grids.append(search_grid(exact, plain))
            lost = (dequantize(round_to_nearest(exact, grids[-1], plain)) - exact).square_().sum(0)
            costs.append((lost * counts).view(-1, self.group_size).sum(1))
        widths = torch.tensor(allocate(torch.stack(costs, 1), (NARROW, WIDE), self.average), device=weight.device)
        scale, zero_point = (torch.where(widths == WIDE, wide, narrow) for narrow, wide in zip(*grids, strict=True))
        empty = split_groups(exact, self.group_size).abs().amax(-1) == 0
        found = self.storable(Grid(scale.masked_fill(empty, 0), zero_point))
        return self.holding(_Widths, widths=widths, found=found)

    def grid(self, weight: Tensor) -> Grid:
        """With widths by the weight alone."""
        return self.fitted(weight, None).grid(weight)

    def nearest(self, weight: Tensor) -> Quantized:
        """With widths by the weight alone."""
        return self.fitted(weight, None).nearest(weight)

    def storable(self, grid: Grid) -> Grid:
        """Scales as integers times a power of two for each row, of which the largest fills eight bits."""
        step = _steps(grid.scale)
        return grid._replace(scale=(grid.scale / step).round_().clamp_(1, (1 << DIGITS) - 1) * step)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """In 4 bits, half to even."""
        return Quantizer(WIDE, symmetric=False).on_grid(x, scale, zero_point)

    def values(self, quantized: Quantized) -> Tensor:
        """``(codes - zero_point) * scale``, whatever the width."""
        return dequantize(quantized)

    def pack(self, quantized: Quantized) -> Tensors:
        """Codes of the narrow groups, and after them those of the wide ones; the widths; scales and zero points."""
        codes, (scale, zero_point) = quantized
        assert zero_point is not None
        rows, columns = codes.shape
        groups = codes.view(rows, -1, self.group_size)
        wide = groups.amax((0, 2)) >= 1 << NARROW
        packed = codes.new_zeros(self._codes(rows, columns).shape)
        parts = ((NARROW, groups[:, ~wide]), (WIDE, groups[:, wide]))
        filled = torch.cat([pack_codes(part.flatten(1), bits) for bits, part in parts], dim=1)
        packed[:, : filled.shape[1]] = filled
        step = _steps(scale)
        return {
            "codes": packed,
            "widths": torch.where(wide, WIDE, NARROW).to(torch.uint8),
            "row_exponent": (torch.log2(step).round() + BIAS).to(torch.uint8),
            "group_scale": (scale / step).to(torch.uint8),
            "zero_point": pack_codes(zero_point.to(torch.uint8), stored_bits(WIDE, len(wide))),
        }

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Products of both scales, in float32."""
        packed, widths = tensors["codes"], tensors["widths"]
        rows, groups = len(packed), columns // self.group_size
        codes = packed.new_empty(rows, groups, self.group_size)
        start = 0
        for bits in (NARROW, WIDE):
            mine = widths == bits
            stop = start + int(mine.sum()) * self.group_size * bits // 8
            codes[:, mine] = unpack_codes(packed[:, start:stop], False, bits).view(rows, -1, self.group_size)
            start = stop
        scale = tensors["group_scale"].float() * torch.exp2(tensors["row_exponent"].float() - BIAS)
        zero_point = unpack_codes(tensors["zero_point"], False, stored_bits(WIDE, groups))
        return Quantized(codes.flatten(1), Grid(scale, zero_point.float()))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, widths, row_exponent, group_scale and zero_point."""
        groups = columns // self.group_size
        return {
            "codes": self._codes(rows, columns),
            "widths": Buffer((groups,), torch.uint8),
            "row_exponent": Buffer((rows, 1), torch.uint8),
            "group_scale": self.scale_buffer(rows, columns, torch.uint8),
            "zero_point": Buffer((rows, groups * stored_bits(WIDE, groups) // 8), torch.uint8),
        }

    def _codes(self, rows: int, columns: int) -> Buffer:
        """Room for as many wide groups as the average allows."""
        groups = columns // self.group_size
        wide = int((self.average - NARROW) * groups + 1e-6) // (WIDE - NARROW)
        return Buffer((rows, self.group_size * (NARROW * groups + (WIDE - NARROW) * wide) // 8), torch.uint8)


class _Widths(Mixed):
    """With what one weight has."""

    widths: Tensor
    """Of each group, ``[groups]``."""
    found: Grid

    def grid(self, weight: Tensor) -> Grid:
        """As it was found."""
        return self.found

    def nearest(self, weight: Tensor) -> Quantized:
        """Of each group in its own bits."""
        scale, zero_point = self.found
        assert zero_point is not None
        steps = split_groups(weight.to(scale), self.group_size) / scale.unsqueeze(-1)
        codes = steps.round_().add_(zero_point.unsqueeze(-1))
        largest = ((1 << self.widths) - 1).to(codes)[:, None]
        return Quantized(torch.minimum(codes.clamp_(min=0), largest).flatten(-2).to(self.code_dtype), self.found)

    def in_column(self, column: int) -> OnGrid:
        """In the bits of its group."""
        found: Callable[..., tuple[Tensor, Tensor]] = _plain(int(self.widths[column // self.group_size])).on_grid
        return found


@cache
def _plain(bits: int) -> Quantizer:
    # GPTQ asks for it at each column.
    return Quantizer(bits, symmetric=False)


def _steps(scale: Tensor) -> Tensor:
    """The power of two ``[out, 1]`` in whose steps the largest scale of a row has eight bits."""
    _, exponent = torch.frexp(scale.amax(-1, keepdim=True).clamp(min=SMALLEST))
    return torch.exp2((exponent - DIGITS).to(scale))
