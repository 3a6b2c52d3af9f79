"""Levels of each output channel's own, as many as it gets bits for (SKIM, arXiv 2412.04180)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.allocation import allocate
from kurtail_pl.maths.gptq import OnGrid
from kurtail_pl.maths.kmeans import row_levels
from kurtail_pl.maths.packing import pack_codes, stored_bits, unpack_codes
from kurtail_pl.maths.quantizers import Grid, Quantized, dequantize
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Format, Tensors

WIDTHS = (2, 3, 4)
"""Bits that an output channel may get."""
LARGEST = 127
"""A row's levels are integers up to that, times its scale."""
PASSES = 500
"""Over a weight: sorting, clusters, and for each width the nearest levels."""


@dataclass(frozen=True)
class Skim(Format):
    """Each output channel has 4, 8 or 16 levels of its own, by k-means, each input counted by the Hessian's diagonal.

    Who gets more of them says the error that is left: bits go where it falls most, until the average is spent. Levels
    are integers of 8 bits times a number of the row, so that what codes stand for are integers throughout.

    Args:
        average: bits of a code over all output channels, 2 to 4.

    Raises:
        ConfigError: when it is not.
    """

    average: float = 3.0

    bits = max(WIDTHS)
    group_size = None
    label = "skim"
    code_dtype = torch.int8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(WIDTHS) <= self.average <= max(WIDTHS):
            raise ConfigError(
                f"weights.average is {self.average}; output channels have {min(WIDTHS)} to {max(WIDTHS)} bits"
            )

    @property
    def average_bits(self) -> float:
        """As asked for."""
        return self.average

    @property
    def code_range(self) -> tuple[int, int]:
        """Levels, rather than their numbers, are codes before they are packed."""
        return -LARGEST, LARGEST

    def sentence(self) -> str:
        """Levels and bits."""
        return f"levels of each output channel's own by k-means, 2 to 4 bits, {self.average:g} on average"

    def cost(self, sizes: Sizes) -> Cost:
        """Of k-means."""
        return Cost(copies=12, passes=PASSES * float(sizes.stack))

    def fitted(self, weight: Tensor, hessian: Tensor | None) -> Format:
        """With the levels of its rows."""
        exact = weight if weight.dtype == torch.float64 else weight.float()
        counts = exact.new_ones(exact.shape[1]) if hessian is None else hessian.diagonal().to(exact)
        rows, tables, scales, costs = len(exact), [], [], []
        for bits, found in zip(WIDTHS, row_levels(exact, counts, [1 << bits for bits in WIDTHS]), strict=True):
            levels = found.to(exact)
            scale = levels.abs().amax(1, keepdim=True) / LARGEST
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            table = (levels / scale).round_()
            lost = _nearest(exact / scale, table) * scale - exact
            costs.append(lost.square_() @ counts)
            # The last level again stands where a row has fewer.
            tables.append(torch.cat([table, table[:, -1:].expand(rows, (1 << self.bits) - (1 << bits))], 1))
            scales.append(scale)
        widths = allocate(torch.stack(costs, 1), WIDTHS, self.average)
        chosen = torch.tensor([WIDTHS.index(width) for width in widths], device=weight.device)[:, None, None]
        table, scale = (torch.stack(each, 1).take_along_dim(chosen, 1)[:, 0] for each in (tables, scales))
        return self.holding(_Levels, table=table, scale=scale)

    def grid(self, weight: Tensor) -> Grid:
        """With levels by the weight alone."""
        return self.fitted(weight, None).grid(weight)

    def nearest(self, weight: Tensor) -> Quantized:
        """On levels by the weight alone."""
        return self.fitted(weight, None).nearest(weight)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """All integers, half to even: levels are known with a weight."""
        code = (x / scale).round_().clamp_(*self.code_range)
        return code, code * scale

    def values(self, quantized: Quantized) -> Tensor:
        """Levels times scales."""
        return dequantize(quantized)

    def pack(self, quantized: Quantized) -> Tensors:
        """Widths and scales of rows; numbers and tables of levels, those of rows in 2 bits first, then 3, then 4."""
        codes, (scale, _) = quantized
        rows, columns = codes.shape
        places = codes.long() + LARGEST
        seen = torch.zeros(rows, 2 * LARGEST + 1, dtype=torch.bool, device=codes.device).scatter_(1, places, True)
        order = seen.cumsum(1) - 1
        numbers, count = order.gather(1, places), seen.sum(1)
        table = codes.new_zeros(rows, 1 << self.bits)
        row, level = seen.nonzero(as_tuple=True)
        table[row, order[row, level]] = (level - LARGEST).to(torch.int8)
        # As few bits as hold the levels in use.
        widths = WIDTHS[0] + torch.bucketize(count, torch.tensor([1 << bits for bits in WIDTHS[:-1]]).to(count))
        mine = [(bits, widths == bits) for bits in WIDTHS]
        packed = [pack_codes(numbers[rows], stored_bits(bits, columns)).flatten() for bits, rows in mine]
        buffers = self.buffers(rows, columns)
        return {
            "codes": _filled(packed, buffers["codes"]),
            "levels": _filled([table[rows, : 1 << bits].flatten() for bits, rows in mine], buffers["levels"]),
            "widths": widths.to(torch.uint8),
            "scale": scale,
        }

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Codes are levels."""
        widths = tensors["widths"]
        codes = tensors["levels"].new_empty(len(widths), columns)
        byte, place = 0, 0
        for bits in WIDTHS:
            rows, kept = widths == bits, stored_bits(bits, columns)
            count = int(rows.sum())
            bytes_, levels = count * columns * kept // 8, count << bits
            numbers = unpack_codes(tensors["codes"][byte : byte + bytes_].view(count, columns * kept // 8), False, kept)
            table = tensors["levels"][place : place + levels].view(count, 1 << bits)
            codes[rows] = table.gather(1, numbers.long())
            byte, place = byte + bytes_, place + levels
        return Quantized(codes, Grid(tensors["scale"], None))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, levels, widths and scale; room for what any rows of the average can take."""
        bytes_ = [columns * stored_bits(bits, columns) // 8 for bits in WIDTHS]
        return {
            "codes": Buffer((self._most(bytes_, rows),), torch.uint8),
            "levels": Buffer((self._most([1 << bits for bits in WIDTHS], rows),), torch.int8),
            "widths": Buffer((rows,), torch.uint8),
            "scale": self.scale_buffer(rows, columns),
        }

    def _most(self, sizes: Sequence[int], rows: int) -> int:
        """The most that rows can take whose bits are at most the average, given what one row of each width takes."""
        ends = product(zip(WIDTHS, sizes, strict=True), repeat=2)
        shares = (
            (first + (second - first) * (self.average - low) / (high - low) if high > low else first)
            for (low, first), (high, second) in ends
            if low <= self.average <= high
        )
        return int(rows * max(shares) + 1e-6)


class _Levels(Skim):
    """With what one weight has."""

    table: Tensor
    """Levels of each row in its scale, ``[out, 16]``, in ascending order."""
    scale: Tensor
    """``[out, 1]``."""

    def grid(self, weight: Tensor) -> Grid:
        """As it was found."""
        return Grid(self.scale, None)

    def nearest(self, weight: Tensor) -> Quantized:
        """On the row's levels."""
        return Quantized(_nearest(weight.to(self.scale) / self.scale, self.table).to(torch.int8), self.grid(weight))

    def in_column(self, column: int) -> OnGrid:
        """On the row's levels."""
        return self._in_rows

    def _in_rows(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        code = _nearest((x / scale)[:, None], self.table.to(scale))[:, 0]
        return code, code * scale


def _nearest(steps: Tensor, table: Tensor) -> Tensor:
    """The level ``[out, levels]`` of its row that is nearest to each number ``[out, n]``; the lower of two as near."""
    middles = (table[:, 1:] + table[:, :-1]) / 2
    return table.gather(1, torch.searchsorted(middles.contiguous(), steps.contiguous()))


def _filled(parts: Sequence[Tensor], buffer: Buffer) -> Tensor:
    """One row of all parts, zeros behind them."""
    whole = parts[0].new_zeros(buffer.shape)
    filled = torch.cat(list(parts))
    whole[: len(filled)] = filled
    return whole
