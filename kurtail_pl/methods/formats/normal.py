"""Levels that are best for a normal distribution (HIGGS, arXiv 2411.17525): no text, no search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.normal_grid import midpoints, normal_error, normal_levels
from kurtail_pl.maths.quantizers import Grid, Quantized, split_groups
from kurtail_pl.methods.format import Buffer, Format, Tensors, in_scales, levels_in_scales


@dataclass(frozen=True)
class Normal(Format):
    """Codes are numbers of levels of the normal distribution, in root mean squares of their group.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale; None for all of an output channel.

    Raises:
        ConfigError: naming the value and what is accepted.
    """

    bits: int = 4
    group_size: int | None = None

    label = "higgs"
    learnable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits is {self.bits}; a grid of the normal distribution has 2 to 8 bits")

    def sentence(self) -> str:
        """Bits and groups."""
        return f"{1 << self.bits} levels of the normal distribution (HIGGS), {self.groups}"

    def grid(self, weight: Tensor) -> Grid:
        """Root mean squares, in float32 at least."""
        grouped = split_groups(weight if weight.dtype == torch.float64 else weight.float(), self.group_size)
        return Grid(grouped.square().mean(-1).sqrt(), None)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """A group of zeros keeps its scale of zero, by which any level is zero."""
        relative = in_scales(x, scale)
        levels = normal_levels(self.bits)
        codes = torch.bucketize(relative, midpoints(levels).to(relative))
        return codes, levels.to(scale)[codes] * scale

    def values(self, quantized: Quantized) -> Tensor:
        """Levels times scales."""
        return levels_in_scales(normal_levels(self.bits), quantized, self.group_size)

    code_dtype = torch.uint8

    def pack(self, quantized: Quantized) -> Tensors:
        """Codes and scale."""
        return {"codes": self.packed(quantized.codes), "scale": quantized.grid.scale}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Inverse of `pack`."""
        return Quantized(self.unpacked(tensors["codes"], columns), Grid(tensors["scale"], None))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes and scale."""
        return {"codes": self.code_buffer(rows, columns), "scale": self.scale_buffer(rows, columns)}

    def relative_error(self) -> float:
        """Of its grid on N(0, 1)."""
        return normal_error(self.bits)
