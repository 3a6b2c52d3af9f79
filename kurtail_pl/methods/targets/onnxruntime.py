"""ONNX Runtime: all steps are nodes of the graph, as far as ONNX has types of integers for them."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.caches.per_token_head import PerTokenHead
from kurtail_pl.methods.formats.nvint4 import NVINT4
from kurtail_pl.methods.formats.progressive import Progressive
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.sides.low_rank import LowRank
from kurtail_pl.methods.target import ONLINE, Rule, Target

SCHEME = "quantization.scheme"
NODES = "https://onnx.ai/onnx/operators"
OPERATORS = "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md"


class ONNXRuntime(Target):
    """Integers of 4 and 8 bits, evenly spaced, with one scale for a head of the cache."""

    name = "onnxruntime"
    recipe = "onnxruntime"
    online = ONLINE
    transforms = True
    rules = (
        Rule("weights", "integers of 4 or 8 bits times a float32 scale", f"{OPERATORS}#com.microsoft.MatMulNBits"),
        Rule("inputs of linears", "divided by their scale, rounded half to even", f"{NODES}/onnx__QuantizeLinear.html"),
        Rule("cache", "codes of 4 bits, two in a byte, and a float32 scale for each token and head", "kurtail_onnx"),
        Rule("R3, R4, R5", "nodes Hadamard, two products of small matrices", "kurtail_onnx"),
        Rule("learned maps", "two products of small matrices, each layer's own", "kurtail_onnx"),
    )

    def lacks(self, scheme: Scheme) -> Iterator[str]:
        """What has no type in ONNX, or no place in the cache."""
        weights = scheme.weights
        if scheme.side is not None and not isinstance(scheme.side, LowRank):
            yield f"the graph has thin matrices alone beside weights: write {SCHEME}.side: null"
        if weights is not None and weights.integers is None and not isinstance(weights, NVINT4 | Progressive):
            yield (
                f"ONNX has evenly spaced weights with integer zero points alone: write {SCHEME}.weights: "
                "{class_path: kurtail_pl.methods.Uniform}"
            )
        parts: dict[str, Quantizer | None] = {"activations": scheme.activations}
        if weights is not None:
            parts["weights"] = weights.integers
        if scheme.cache is not None:
            if not isinstance(scheme.cache, PerTokenHead):
                yield f"the graph has its own cache: write {SCHEME}.cache.class_path: kurtail_pl.methods.PerTokenHead"
                return
            yield from _cache(scheme.cache)
            parts |= {"cache.keys": scheme.cache.keys, "cache.values": scheme.cache.values}
        for name, quantizer in parts.items():
            if quantizer is not None and not quantizer.is_plain:
                yield (
                    f"the graph rounds to integers with float scales: write {SCHEME}.{name}.levels: integer and "
                    f"{SCHEME}.{name}.scales: float32"
                )
            if quantizer is not None and quantizer.bits not in (4, 8):
                yield f"ONNX has integers of 4 and 8 bits: write {SCHEME}.{name}.bits: 4"


def _cache(cache: PerTokenHead) -> Iterator[str]:
    if cache.sinks is not None:
        yield f"the graph caches all tokens alike: write {SCHEME}.cache.sinks: null"
    for name, quantizer in {"keys": cache.keys, "values": cache.values}.items():
        if quantizer is not None and quantizer.group_size is not None:
            yield f"the graph's cache has one scale a head: write {SCHEME}.cache.{name}.group_size: null"
