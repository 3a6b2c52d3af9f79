"""llama.cpp: blocks of 32 numbers everywhere, 8-bit inputs of linears, and a cache that it turns itself."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.caches.q4_0_cache import Q4_0Cache
from kurtail_pl.methods.formats.fp4 import MXFP4, NVFP4
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.rounders.hqq import FloatZero
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import Rule, Target, beside_the_quantizers

SCHEME = "quantization.scheme"
SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master"
INPUTS = Quantizer(bits=8, symmetric=True, group_size=32)


class LlamaCpp(Target):
    """Files in GGUF: Q4_0, Q4_1, Q8_0, MXFP4 or NVFP4, with all rotations fused.

    What a processor makes of the inputs of linears is mirrored but for the type of their scale: float16 there, which
    moves a value by up to 2^-12 of itself where rounding to 8 bits moves it by 2^-8 of the largest in its block.
    """

    name = "llama.cpp"
    recipe = "llama-cpp"
    clips = False
    rules = (
        Rule(
            "weights", "codes of 4 or 8 bits in blocks of 32, a float16 scale each", f"{SOURCE}/ggml/src/ggml-common.h"
        ),
        Rule(
            "inputs of linears",
            "codes of 8 bits in blocks of 32: the largest magnitude over 127 is the scale, no clip",
            f"{SOURCE}/ggml/src/ggml-quants.c, quantize_row_q8_0_ref",
        ),
        Rule(
            "cache",
            "turned by a Hadamard, then codes of 4 bits in blocks of 32 (-ctk q4_0 -ctv q4_0)",
            f"{SOURCE}/src/llama-kv-cache.cpp",
        ),
    )

    def lacks(self, scheme: Scheme) -> Iterator[str]:
        """What has no block, and what is no rule of it."""
        weights = scheme.weights
        if isinstance(weights, FloatZero) or not isinstance(weights, Uniform | MXFP4 | NVFP4 | None):
            yield (
                f"GGUF has no blocks for {weights.sentence()}: write {SCHEME}.weights: "
                "{class_path: kurtail_pl.methods.Uniform, init_args: {scales: float16}}"
            )
        elif isinstance(weights, Uniform):
            yield from _integers(weights)
        if scheme.activations not in (INPUTS, None):
            yield (
                f"llama.cpp rounds what linears read to 8 bits in blocks of 32: write {SCHEME}.activations: "
                "{bits: 8, symmetric: true, clip: {kind: ratio, amount: 1.0}, group_size: 32}"
            )
        if scheme.attention_output != "token":
            yield f"o_proj reads blocks of 32, too: write {SCHEME}.attention_output: token"
        if not isinstance(scheme.cache, Q4_0Cache | None):
            yield (
                f"llama.cpp has caches of its own: write {SCHEME}.cache: null (float16), or "
                "{class_path: kurtail_pl.methods.Q4_0Cache}"
            )
        yield from beside_the_quantizers(scheme, "llama.cpp")


def _integers(weights: Uniform) -> Iterator[str]:
    if weights.scales != "float16":
        yield f"GGUF's scales are float16: write {SCHEME}.weights.scales: float16"
    if weights.group_size is not None and weights.group_size % 32:
        yield f"GGUF has blocks of 32: write {SCHEME}.weights.group_size: 32, a multiple of it, or null"
    if not weights.symmetric and weights.bits > 4:
        yield f"GGUF has zero points in up to 4 bits: write {SCHEME}.weights.symmetric: true"
