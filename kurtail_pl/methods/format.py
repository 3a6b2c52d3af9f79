"""Formats of weights: from numbers to codes and back, and the tensors that stand for them in a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kurtail_pl.maths.gptq import OnGrid
from kurtail_pl.maths.packing import pack_codes, stored_bits, unpack_codes
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, require_groups, split_groups
from kurtail_pl.methods.method import Method

Tensors = dict[str, Tensor]
"""Of one weight, by their names in the file, behind the name of its linear."""


class Buffer(NamedTuple):
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Method):
    """How a weight ``[out, in]`` is stored: levels, the scales of groups of inputs, and their tensors.

    Attributes:
        bits: of a code.
        group_size: inputs that share a scale; None for all.
        even: whether levels are evenly spaced, as coordinate descent on the codes asks for.
        learnable: whether `scale` is a plain number, and may learn.
        fits_scales: whether refinement gives each group the scale that is best for its codes; not where scales that
            can be stored lie too far apart for that.
    """

    bits: int
    group_size: int | None
    even: ClassVar[bool] = False
    learnable: ClassVar[bool] = False
    fits_scales: ClassVar[bool] = True

    def require(self, name: str, widths: tuple[int, ...]) -> None:
        """Raise ConfigError, naming the setting, when groups do not divide the widths of a model's linears."""
        require_groups(name, self.group_size, widths)

    @abstractmethod
    def grid(self, weight: Tensor) -> Grid:
        """Scales ``[out, groups]`` that are best for a weight ``[out, in]`` when each number is rounded by itself."""

    @property
    def integers(self) -> Quantizer | None:
        """Evenly spaced integers, zero points among them, where its codes are some, with one scale each; else None."""
        return None

    def spanning(self, share: Tensor) -> Format:
        """The same with grids that span a share ``[out, 1]`` of the range of each group of a row, without a search."""
        raise NotImplementedError(f"{type(self).__name__} has no grids that span a share")

    def holding(self, kind: type[Format], **found: object) -> Format:
        """The same settings as a kind, made for one weight alone, that holds what was found for it."""
        own = kind(**{each.name: getattr(self, each.name) for each in fields(self)})  # type: ignore[arg-type]
        for name, value in found.items():
            object.__setattr__(own, name, value)
        return own

    def fitted(self, weight: Tensor, hessian: Tensor | None) -> Format:
        """The same with what it takes from a weight ``[out, in]`` and the Hessian of its inputs, if there is one.

        For most formats that is nothing. Codes and grid tell all of it: the format itself stores and reads them.
        """
        return self

    def storable(self, grid: Grid) -> Grid:
        """The nearest grid whose scales are stored as they are; here any is."""
        return grid

    @abstractmethod
    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nearest codes of numbers and what they stand for, both float; all arguments broadcast."""

    def in_column(self, column: int) -> OnGrid:
        """`on_grid` for numbers of one column of a weight, ``[out]``; for most formats all columns are alike."""
        return self.on_grid

    @abstractmethod
    def values(self, quantized: Quantized) -> Tensor:
        """What codes ``[out, in]`` on a grid ``[out, groups]`` stand for, in the scales' type."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return 0, (1 << self.bits) - 1

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """Type of codes before they are packed."""

    @abstractmethod
    def pack(self, quantized: Quantized) -> Tensors:
        """The tensors to store."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Codes ``[out, columns]`` and their grid, of stored tensors."""

    @abstractmethod
    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """What `pack` gives for a weight ``[rows, columns]``."""

    def nearest(self, weight: Tensor) -> Quantized:
        """Each number of a weight ``[out, in]`` rounded by itself (RTN), on the best grid for that."""
        grid = self.grid(weight)
        grouped = split_groups(weight, self.group_size)
        zero_point = None if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
        codes, _ = self.on_grid(grouped, grid.scale.unsqueeze(-1), zero_point)
        return Quantized(codes.flatten(-2).to(self.code_dtype), grid)

    def packed(self, codes: Tensor) -> Tensor:
        """Codes ``[out, in]`` as they are stored, in as few bytes as rows of them fill."""
        bits = stored_bits(self.bits, codes.shape[-1])
        return codes if bits == 8 else pack_codes(codes, bits)

    def unpacked(self, codes: Tensor, columns: int) -> Tensor:
        """Codes ``[out, columns]`` of what is stored."""
        bits = stored_bits(self.bits, columns)
        return codes if bits == 8 else unpack_codes(codes, self.code_dtype.is_signed, bits)

    def code_buffer(self, rows: int, columns: int) -> Buffer:
        """What `packed` gives for codes ``[rows, columns]``."""
        bits = stored_bits(self.bits, columns)
        return Buffer((rows, columns * bits // 8), self.code_dtype if bits == 8 else torch.uint8)

    def scale_buffer(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """Of one number for each group of a weight ``[rows, columns]``."""
        return Buffer((rows, columns // (self.group_size or columns)), dtype)

    @property
    def average_bits(self) -> float:
        """Of a code, where not all have the same."""
        return self.bits

    @property
    def groups(self) -> str:
        """What shares a scale, in words."""
        return "per output channel" if self.group_size is None else f"in groups of {self.group_size}"

    def relative_error(self) -> float | None:
        """Mean square error of normal numbers over their variance; None where it has not been derived."""
        return None


def in_scales(x: Tensor, scale: Tensor) -> Tensor:
    """Numbers in scales, which they broadcast with; a scale of zero stands for a group of zeros, and counts as one."""
    return x.to(scale.dtype) / torch.where(scale > 0, scale, torch.ones_like(scale))


def levels_in_scales(levels: Tensor, quantized: Quantized, group_size: int | None) -> Tensor:
    """Levels by their numbers ``[out, in]``, times the scales ``[out, groups]``."""
    codes, (scale, _) = quantized
    return (split_groups(levels.to(scale)[codes.int()], group_size) * scale.unsqueeze(-1)).reshape(codes.shape)
