"""Uniform quantizers, each in integer form (codes, scale, zero point) and as the fake quantizer that equals it.

Rounding is half to even. A *group* is a run of the last dimension that shares one scale: the whole last dimension
(per token, per output channel), a fixed number of channels, or one attention head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.microscaling import LARGEST_E2M1, LEVELS, SCALES, Levels, Scales, dynamic_scales, e2m1_halves
from kurtail_pl.maths.rounding import rounded


class Grid(NamedTuple):
    """Scale and integer zero point of every group, both ``[..., groups]``; the zero point is None when symmetric."""

    scale: Tensor
    zero_point: Tensor | None


class Quantized(NamedTuple):
    """Integer form of a tensor: int8 codes ``[..., n]`` (uint8 when asymmetric) and their grid."""

    codes: Tensor
    grid: Grid


@dataclass(frozen=True)
class Quantizer:
    """What a quantizer is: bits, symmetry, clip, group, levels and scales, checked on construction.

    Args:
        bits: 2 to 8.
        symmetric: codes in ``[-2^(b-1), 2^(b-1)-1]`` and no zero point, else ``[0, 2^b-1]`` with an integer one.
        clip: where the grid ends.
        group_size: channels that share a scale; None for the whole last dimension.
        levels: ``integer``, or ``e2m1``, 4-bit floating point, whose levels are 0 to 12 halves.
        scales: of groups: ``float32``; powers of two, ``e8m0`` (MXFP4: e2m1 in groups of 32); or ``e4m3`` times what a
            token's groups share (NVFP4: e2m1 in groups of 16).

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    bits: int = 4
    symmetric: bool = True
    clip: Clip = field(default_factory=Clip)
    group_size: int | None = None
    levels: Levels = "integer"
    scales: Scales = "float32"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits is {self.bits}; a quantizer has 2 to 8 bits (16 turns quantization off)")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size is {self.group_size}; give a positive number of channels or null")
        for name, value, known in (("levels", self.levels, LEVELS), ("scales", self.scales, SCALES)):
            if value not in known:
                raise ConfigError(f"{name} is {shortened(repr(value), 40)}; write {' or '.join(known)}")
        if self.levels == "e2m1" and self.bits != 4:
            raise ConfigError(f"levels is e2m1 and bits is {self.bits}; E2M1 has 4: write bits: 4, or levels: integer")
        if not (self.symmetric or self.is_plain):
            raise ConfigError(
                f"levels is {self.levels}, scales is {self.scales} and symmetric is false; only integers with float32 "
                "scales have zero points: write symmetric: true"
            )

    def __str__(self) -> str:
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        kind = f"{self.bits} bits, {symmetry}" if self.levels == "integer" else "4-bit floating point (E2M1)"
        scales = "" if self.scales == "float32" else f", scales in {self.scales.upper()}"
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{kind}{scales}, clip {self.clip}{groups}"

    @property
    def is_plain(self) -> bool:
        """Whether it has integers and scales that may be any number, as runtimes' kernels for integers have."""
        return self.levels == "integer" and self.scales == "float32"

    def clipped(self, ratio: float) -> Quantizer:
        """The same with a ratio as its clip."""
        return replace(self, clip=Clip(amount=ratio))

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.levels == "e2m1":
            return -LARGEST_E2M1, LARGEST_E2M1
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    @property
    def fits_scales(self) -> bool:
        """Any scale can be stored."""
        return True

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of codes."""
        return torch.int8 if self.symmetric else torch.uint8

    def storable(self, grid: Grid) -> Grid:
        """Any grid is."""
        return grid

    def nearest(self, x: Tensor) -> Tensor:
        """Nearest levels of numbers in scales, which may be overwritten; integers do not end here."""
        return e2m1_halves(x) if self.levels == "e2m1" else rounded(x)

    def in_column(self, column: int) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """`on_grid`: all columns of a weight are alike."""
        return self.on_grid

    def fake(self, x: Tensor, grid: Grid | None) -> Tensor:
        """As `fake_quantize`."""
        if grid is None:
            grid = dynamic_grid(split_groups(x.detach(), self.group_size), self)
        quantized: Tensor = _StraightThrough.apply(x, *grid, self)  # type: ignore[no-untyped-call]
        return quantized

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nearest codes of numbers, half to even, and what they stand for; both float, all arguments broadcast."""
        code = self.nearest(x / scale)
        if zero_point is not None:
            code += zero_point
        code.clamp_(*self.code_range)
        return code, (code if zero_point is None else code - zero_point) * scale


def quantize(x: Tensor, quantizer: Quantizer, grid: Grid | None = None) -> Quantized:
    """Integer form of x.

    Args:
        x: ``[..., n]``.
        quantizer: its bits, symmetry, clip and group size.
        grid: that of all groups, ``[1]``; None gives each group its own, from its values (`dynamic_grid`).

    Returns:
        Codes ``[..., n]`` and a grid ``[..., groups]``, or the given one.

    Raises:
        ValueError: when the group size does not divide n.
    """
    grouped = split_groups(x, quantizer.group_size)
    grid = dynamic_grid(grouped, quantizer) if grid is None else grid
    codes = codes_on(grouped, grid, quantizer)
    dtype = torch.int8 if quantizer.symmetric else torch.uint8
    return Quantized(codes.reshape(x.shape).to(dtype), grid)


def dequantize(quantized: Quantized) -> Tensor:
    """Values ``(codes - zero_point) * scale`` of an integer form, ``[..., n]``, in the scale's dtype."""
    codes, grid = quantized
    grouped = codes.reshape(*codes.shape[:-1], grid.scale.shape[-1], -1).to(grid.scale.dtype)
    return values_of(grouped, grid).reshape(codes.shape)


def fake_quantize(x: Tensor, quantizer: Quantizer, grid: Grid | None = None) -> Tensor:
    """`dequantize` of `quantize`, bit for bit, without the integers: ``[..., n]`` -> ``[..., n]``.

    Gradients pass to x as if nothing had been rounded (the straight-through estimator, Bengio et al., arXiv 1308.3432).
    To the scale, where it learns, they pass as if no value rounded otherwise because of it, but with the value's own
    part in x (learned step sizes, Esser et al., arXiv 1902.08153, equation 3); a `LearnedClip` has its from there.
    """
    return quantizer.fake(x, grid)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, quantizer: Quantizer) -> Tensor:
        grouped, grid = split_groups(x, quantizer.group_size), Grid(scale, zero_point)
        values = values_of(codes_on(grouped, grid, quantizer), grid)
        if ctx.needs_input_grad[1]:
            step, error = scale.unsqueeze(-1), values - grouped
            # Further than half a step lies only what was clipped.
            ctx.save_for_backward(torch.where(error.abs() <= step / 2, error, values) / step)
        return values.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        (slope,) = ctx.saved_tensors
        return gradient, (gradient.reshape(slope.shape) * slope).sum(-1), None, None


def require_groups(name: str, group_size: int | None, widths: Sequence[int]) -> None:
    """Raise ConfigError, naming the setting, when groups do not divide the widths of a model that they are for."""
    largest, different = math.gcd(*widths), list(dict.fromkeys(widths))
    all_of_them = f", which divides {' and '.join(map(str, different))}" if len(different) > 1 else ""
    for width in different:
        if group_size is not None and width % group_size:
            raise ConfigError(
                f"{name}.group_size is {group_size} and this model has {width} channels to divide; "
                f"choose a divisor of {largest}{all_of_them}, or null"
            )


def split_groups(x: Tensor, group_size: int | None) -> Tensor:
    """View ``[..., n]`` as ``[..., groups, group_size]``; raises ValueError when the size does not divide n."""
    size = x.shape[-1] if group_size is None else group_size
    if x.shape[-1] % size:
        raise ValueError(f"group_size {size} does not divide the {x.shape[-1]} channels; choose a divisor")
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def dynamic_grid(grouped: Tensor, quantizer: Quantizer) -> Grid:
    """Grid of each group from the group's own values.

    Args:
        grouped: ``[..., groups, group_size]``.
        quantizer: the clip decides where the grid ends.

    Returns:
        Grid ``[..., groups]``; a group of zeros gets scale 1.
    """
    clip = quantizer.clip
    if quantizer.symmetric:
        limit = clip.largest(grouped.abs())
        return Grid(dynamic_scales(limit, quantizer.code_range[1], quantizer.scales), None)
    return asymmetric_grid(clip.smallest(grouped), clip.largest(grouped), quantizer.bits)


def symmetric_grid(limit: Tensor, bits: int) -> Grid:
    """Grid whose largest code stands for ``limit`` ``[...]``; scale 1 where the limit is zero."""
    return Grid(dynamic_scales(limit, (1 << (bits - 1)) - 1, "float32"), None)


def asymmetric_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Grid over ``[min(low, 0), max(high, 0)]``, both ``[...]``: zero is always one of its values."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / ((1 << bits) - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Grid(scale, rounded(-low / scale))


def codes_on(grouped: Tensor, grid: Grid, quantizer: Quantizer) -> Tensor:
    """Nearest codes of ``[..., groups, group_size]`` on a grid ``[..., groups]``, as floats."""
    codes = quantizer.nearest(grouped / grid.scale.unsqueeze(-1))
    if grid.zero_point is not None:
        codes += grid.zero_point.unsqueeze(-1)
    return codes.clamp_(*quantizer.code_range)


def values_of(codes: Tensor, grid: Grid) -> Tensor:
    """Values of float codes ``[..., groups, group_size]`` on a grid ``[..., groups]``."""
    if grid.zero_point is not None:
        codes = codes - grid.zero_point.unsqueeze(-1)
    return codes * grid.scale.unsqueeze(-1)
