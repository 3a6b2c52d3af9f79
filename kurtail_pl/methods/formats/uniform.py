"""Integers: evenly spaced levels, a scale for each output channel or group, a zero point if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import LearnedClip
from kurtail_pl.maths.half_grid import half_grid
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, dequantize, dynamic_grid, split_groups
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Format, Tensors

SEARCH_PASSES = 80 * 10
"""The search makes so many passes over a weight: 80 clip ratios, about ten elementwise steps each."""


@dataclass(frozen=True)
class Uniform(Format):
    """Evenly spaced levels, with a scale by a search of 80 clip ratios (`maths.weights.search_grid`).

    Args:
        bits: 2 to 8.
        symmetric: without a zero point.
        group_size: inputs that share a scale; None for all of an output channel.
        scales: numbers that scales may be: any of ``float32``, or those of ``float16``, as files of other runtimes
            store them; with a zero point those whose product with it float16 holds too, in up to 4 bits.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = None
    scales: Literal["float32", "float16"] = "float32"

    label = ""
    learnable = True
    even = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.quantizer  # Which refuses bits and groups that nothing has.
        if self.scales == "float16" and not self.symmetric and self.bits > 4:
            raise ConfigError(
                f"scales is float16 and the weights are asymmetric in {self.bits} bits; float16 holds a scale and its "
                "products with zero points of up to 4 bits: write bits: 4, symmetric: true or scales: float32"
            )

    @property
    def quantizer(self) -> Quantizer:
        """The same for activations and caches."""
        return _quantizer_of(self)

    @property
    def integers(self) -> Quantizer | None:
        """Those of the quantizer."""
        return self.quantizer

    def sentence(self) -> str:
        """Bits, symmetry and groups."""
        what = "symmetric" if self.symmetric else "asymmetric"
        scales = "" if self.scales == "float32" else f", scales in {self.scales}"
        return f"{self.bits}-bit integers, {what}, {self.groups}{scales}"

    def cost(self, sizes: Sizes) -> Cost:
        """The search of its grid."""
        return Cost(passes=SEARCH_PASSES * float(sizes.stack))

    def grid(self, weight: Tensor) -> Grid:
        """By the search."""
        return self.storable(search_grid(weight, self.quantizer))

    def spanning(self, share: Tensor) -> Format:
        """A value for one weight, which no recipe has."""
        return self.holding(_Spanning, share=share)

    def storable(self, grid: Grid) -> Grid:
        """By `scales`."""
        return grid if self.scales == "float32" else half_grid(grid)

    def nearest(self, weight: Tensor) -> Quantized:
        """On that grid."""
        return round_to_nearest(weight, self.grid(weight), self.quantizer)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Half to even."""
        return self.quantizer.on_grid(x, scale, zero_point)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.quantizer.code_range

    def values(self, quantized: Quantized) -> Tensor:
        """``(codes - zero_point) * scale``."""
        return dequantize(quantized)

    @property
    def code_dtype(self) -> torch.dtype:
        """Signed when symmetric."""
        return self.quantizer.code_dtype

    def pack(self, quantized: Quantized) -> Tensors:
        """Codes, scale and, when asymmetric, zero_point."""
        codes, (scale, zero_point) = quantized
        tensors = {"codes": self.packed(codes), "scale": scale}
        return tensors if zero_point is None else {**tensors, "zero_point": zero_point.to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Zero points in the scales' type."""
        codes, scale = self.unpacked(tensors["codes"], columns), tensors["scale"]
        return Quantized(codes, Grid(scale, None if self.symmetric else tensors["zero_point"].to(scale.dtype)))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, scale and, when asymmetric, zero_point."""
        found = {"codes": self.code_buffer(rows, columns), "scale": self.scale_buffer(rows, columns)}
        return found if self.symmetric else {**found, "zero_point": self.scale_buffer(rows, columns, torch.uint8)}


class _Spanning(Uniform):
    """Evenly spaced levels whose range is known."""

    share: Tensor

    def grid(self, weight: Tensor) -> Grid:
        """By the share."""
        clip = LearnedClip(amount=self.share.to(weight))
        grouped = split_groups(weight, self.group_size)
        return self.storable(dynamic_grid(grouped, replace(self.quantizer, clip=clip)))


@cache
def _quantizer_of(weights: Uniform) -> Quantizer:
    # GPTQ asks for it at each column.
    return Quantizer(weights.bits, weights.symmetric, group_size=weights.group_size)
