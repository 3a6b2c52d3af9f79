"""What formats of caches are in vLLM: one function for each that has a form there."""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

from kurtail_pl.methods import CacheFormat, Int4PerTokenHead, PerTokenHead

TYPES = {4: "int4_per_token_head", 8: "int8_per_token_head"}
"""`--kv-cache-dtype` for the bits of keys and values; both have a scale for each token and head."""


class Kept(NamedTuple):
    """What vLLM's cache has in the place of an artefact's.

    Args:
        dtype: `--kv-cache-dtype`; None for vLLM's own choice, the model's type.
        refused: what no cache of vLLM's has, in a sentence, or None.
    """

    dtype: str | None
    refused: str | None = None


@singledispatch
def cache_of(cache: CacheFormat | None) -> Kept:
    """The cache of a format; any other is refused."""
    assert cache is not None
    own = "{class_path: kurtail_pl.methods.Int4PerTokenHead}"
    return Kept(None, f"vLLM has no cache like {cache.sentence()}: quantize with cache: {own}, or cache: null")


@cache_of.register
def _(cache: None) -> Kept:
    return Kept(None)


@cache_of.register
def _(cache: Int4PerTokenHead) -> Kept:
    return Kept(TYPES[4])


@cache_of.register
def _(cache: PerTokenHead) -> Kept:
    if cache.sinks is not None:
        return Kept(
            None,
            f"sinks keep the first {cache.sinks.tokens} tokens in {cache.sinks.bits} bits; vLLM's cache keeps all "
            "tokens alike: quantize with sinks: null",
        )
    if cache.centre_keys:
        return Kept(None, "centre_keys is true, and vLLM's cache subtracts nothing: quantize with centre_keys: false")
    quantizers = (cache.keys, cache.values)
    for quantizer in quantizers:
        if quantizer is not None and not quantizer.is_plain:
            return Kept(
                None,
                f"the cache keeps numbers in {quantizer}; vLLM's has integers with float scales: quantize with levels: "
                "integer and scales: float32",
            )
    bits = {None if quantizer is None else quantizer.bits for quantizer in quantizers}
    return Kept(TYPES.get(bits.pop() or 0) if len(bits) == 1 else None)
