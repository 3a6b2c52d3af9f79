"""What formats of caches are in ONNX: one function for each that has a form there."""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import CacheFormat, PerTokenHead


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
