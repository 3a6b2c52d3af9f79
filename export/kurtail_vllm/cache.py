"""What vLLM's cache has in the place of an artefact's."""

from __future__ import annotations

from kurtail_pl.methods.scheme import Scheme

TYPES = {4: "int4_per_token_head", 8: "int8_per_token_head"}
"""`--kv-cache-dtype` for the bits of keys and values; both have a scale for each token and head."""


def cache_type(scheme: Scheme) -> str | None:
    """`--kv-cache-dtype` that has the bits of keys and values; None for vLLM's own choice, the model's type."""
    bits = {None if quantizer is None else quantizer.bits for quantizer in (scheme.keys, scheme.values)}
    return TYPES.get(bits.pop() or 0) if len(bits) == 1 else None


def not_in_the_cache(scheme: Scheme) -> str | None:
    """What of a scheme no cache of vLLM's has, in a sentence."""
    if scheme.sinks is not None:
        return (
            f"sinks keep the first {scheme.sinks.tokens} tokens in {scheme.sinks.bits} bits; vLLM's cache keeps all "
            "tokens alike: quantize with sinks: null"
        )
    if scheme.centre_keys:
        return "centre_keys is true, and vLLM's cache subtracts nothing: quantize with centre_keys: false"
    return None
