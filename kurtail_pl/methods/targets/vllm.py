"""vLLM: 4-bit weights times 4-bit inputs, with R4 and R5 before them, and a 4-bit cache that it turns itself."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.caches.int4_per_token_head import Int4PerTokenHead
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import Rule, Target, beside_the_quantizers

SCHEME = "quantization.scheme"
SOURCE = "https://github.com/vllm-project/vllm/blob/main/vllm"
SCHEMES = f"{SOURCE}/model_executor/layers/quantization/compressed_tensors"
SMALLEST_GROUP = 64


class VLLMKernels(Target):
    """Folders of compressed-tensors, on a GPU of compute capability 8.0 to 8.9, started as their README says.

    Newer GPUs take 8 bits for 4-bit inputs or leave them float, without a word (vLLM 0.32, `utils/humming/schema.py`).
    """

    name = "vllm"
    recipe = "vllm"
    online = ("attention_output", "mlp_hidden")
    clips = False
    rules = (
        Rule(
            "R4, R5",
            "what o_proj and down_proj read, times the matrix of transform_config",
            f"{SCHEMES}/transform/module.py",
        ),
        Rule("weights", "symmetric codes of 4 or 8 bits, a scale for each output or group", f"{SCHEMES}/schemes"),
        Rule(
            "inputs of linears",
            "the largest magnitude of a token or group over 7 (127 for 8 bits) is the scale; no clip",
            "https://pypi.org/project/humming-kernels, humming/testing/process_input.py",
        ),
        Rule(
            "cache",
            "turned by a random Hadamard, then 4 bits from the smallest to the largest of a token and head",
            f"{SOURCE}/v1/attention/ops/int4_per_token_head.py",
        ),
    )

    def lacks(self, scheme: Scheme) -> Iterator[str]:
        """What no kernel of it computes."""
        weights = scheme.weights
        if weights is not None and weights.integers is None:
            yield (
                f"vLLM has no kernel here for {weights.sentence()}: write {SCHEME}.weights: "
                "{class_path: kurtail_pl.methods.Uniform}"
            )
        elif weights is not None and weights.bits not in (4, 8):
            yield f"vLLM has weights of 4 and 8 bits: write {SCHEME}.weights.bits: 4"
        if scheme.activations is not None:
            yield from _inputs(scheme, scheme.activations)
        if not isinstance(scheme.cache, Int4PerTokenHead | None):
            yield (
                f"vLLM has caches of its own: write {SCHEME}.cache: null (16 bits), or "
                "{class_path: kurtail_pl.methods.Int4PerTokenHead}"
            )
        yield from beside_the_quantizers(scheme, "vLLM")


def _inputs(scheme: Scheme, activations: Quantizer) -> Iterator[str]:
    """Of quantized inputs of linears, and the weights beside them."""
    if not activations.is_plain:
        yield (
            f"vLLM multiplies integers with float scales here: write {SCHEME}.activations.levels: integer and "
            f"{SCHEME}.activations.scales: float32"
        )
    if activations.bits not in (4, 8):
        yield f"vLLM has activations of 4 and 8 bits: write {SCHEME}.activations.bits: 4"
    if not activations.symmetric:
        yield f"vLLM's activations have no zero points: write {SCHEME}.activations.symmetric: true"
    if activations.clip != Clip():
        yield f"vLLM clips no activations: write {SCHEME}.activations.clip.amount: 1.0, and kind: ratio"
    if scheme.attention_output != "token":
        yield f"o_proj reads tokens with one scale, too: write {SCHEME}.attention_output: token"
    if isinstance(scheme.weights, Uniform):
        yield from _together(scheme.weights, activations)


def _together(weights: Uniform, activations: Quantizer) -> Iterator[str]:
    """What its kernel does not multiply, or multiplies after rounding scales again (`humming/transform.py`)."""
    if not weights.symmetric:
        yield f"vLLM multiplies weights without zero points: write {SCHEME}.weights.symmetric: true"
    if weights.group_size != activations.group_size and weights.group_size is not None:
        yield f"vLLM rounds scales of groups again unless inputs have the same: write {SCHEME}.weights.group_size: null"
    sizes = {"weights": weights.group_size, "activations": activations.group_size}
    for name, size in sizes.items():
        if size is not None and activations.bits == 8:
            yield f"vLLM leaves 8-bit inputs float beside groups: write {SCHEME}.{name}.group_size: null"
        if size is not None and size < SMALLEST_GROUP:
            yield f"vLLM has groups of {SMALLEST_GROUP} and more: write {SCHEME}.{name}.group_size: 128, or null"
