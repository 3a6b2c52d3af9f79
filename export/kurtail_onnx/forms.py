"""What formats of weights and caches, and sides, are in ONNX: one function for each that has a form there."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple

from torch import Tensor

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import NVINT4, CacheFormat, Format, LowRank, PerTokenHead, Progressive, Side
from kurtail_pl.methods.formats.blocks import in_float


class CacheIntegers(NamedTuple):
    """Quantizers of keys and values, with a scale for each token and head; None leaves them float."""

    keys: Quantizer | None
    values: Quantizer | None


@singledispatch
def cache_integers_of(cache: CacheFormat | None) -> CacheIntegers | None:
    """The integers that the graph keeps of all tokens alike; None for a format that has no such form."""
    return None


@cache_integers_of.register
def _(cache: PerTokenHead) -> CacheIntegers | None:
    return CacheIntegers(cache.keys, cache.values) if cache.sinks is None else None


@cache_integers_of.register
def _(cache: None) -> CacheIntegers:
    return CacheIntegers(None, None)


@singledispatch
def weight_integers_of(weights: Format | None) -> Quantizer | None:
    """The integers that a graph dequantizes by a scale for each output or group; None for a format without."""
    return None if weights is None else weights.integers


@weight_integers_of.register
def _(weights: Progressive) -> Quantizer:
    return Quantizer(weights.bits, symmetric=False, group_size=weights.group_size)


@weight_integers_of.register
def _(weights: NVINT4) -> Quantizer:
    return Quantizer(weights.bits, group_size=weights.group_size)


@singledispatch
def scales_of(weights: Format, stored: Callable[[str], Tensor]) -> Tensor:
    """Scales ``[out, groups]`` of those integers; `stored` reads a tensor of the weight by its name."""
    return stored("scale")


@scales_of.register
def _(weights: Progressive, stored: Callable[[str], Tensor]) -> Tensor:
    # Of eight bits and four: exact in float32.
    return stored("row_scale").float() * stored("group_scale").float()


@scales_of.register
def _(weights: NVINT4, stored: Callable[[str], Tensor]) -> Tensor:
    # Of four bits, times a power of two: exact in float32.
    return in_float(stored("blocks"), stored("tensor_scale"))


@singledispatch
def is_thin(side: Side | None) -> bool:
    """Whether there is nothing beside the weights but two thin matrices, `down` and `up`."""
    return side is None


@is_thin.register
def _(side: LowRank) -> bool:
    return True
