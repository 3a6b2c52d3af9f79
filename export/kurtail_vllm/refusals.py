"""What vLLM does not compute: each subject has its function, which names the setting to change.

Read in vLLM 0.32, `vllm/model_executor/layers/quantization/`: `compressed_tensors/` chooses a kernel for each layer,
and `utils/humming/` has the rules of the only one that multiplies by quantized activations, humming-kernels (0.1.19).
"""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_pl.artefact.source import Source
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_vllm.forms import cache_of
from kurtail_vllm.groups import Form, form_of, linears_of
from kurtail_vllm.settings import Activations
from kurtail_vllm.transforms import transforms_of

BITS = (4, 8)
INPUT_BITS, OUTPUTS, SMALLEST_GROUP = 128, 8, 64
"""Of the inputs and outputs that the kernel fills up to whole tiles, and the inputs of a group
(`humming/kernel/humming.py`, `humming/schema/humming.py`)."""
WORD = 32
NONE = "--to.activations none"
FLOAT = f"or export with {NONE}"


def reasons(source: Source, dtype: str, activations: Activations) -> Iterator[str]:
    """Sentences that each say what is not computed and what to do about it; the first is worth reading."""
    if source.architecture.interleaved:
        yield (
            f"vLLM reads the experts of a {source.config.model_type} stacked, and this export writes each by itself: "
            "use the artefact with kurtail_pl.load"
        )
    if source.architecture.rigid_residual is not None:
        yield (
            f"a {source.config.model_type} has norms of what its blocks write, so that R1 turns what its linears read "
            "at run time, and this export writes no such transforms: use the artefact with kurtail_pl.load"
        )
    yield from _weights(source)
    yield from _scheme(source)
    yield from _transforms(source)
    if activations == "auto" and source.scheme.activations is not None:
        yield from _whole_model(source, dtype)
        for name, linear in linears_of(source):
            form = form_of(linear, activations)
            yield from _quantizers(name, form, bool(source.clips))
            yield from _sizes(name, form, linear)


def _weights(source: Source) -> Iterator[str]:
    """What ``pack-quantized`` does not hold, or no kernel reads."""
    if source.scheme.weights is None:
        yield "the weights are float: quantize them, with weights: {class_path: kurtail_pl.methods.Uniform}"
    for name, linear in linears_of(source):
        assert linear.weights is not None
        weights = linear.weights.integers
        if weights is None:
            yield (
                f"the weights are {linear.weights.sentence()}, and pack-quantized holds evenly spaced integers with "
                "integer zero points alone: quantize with weights: {class_path: kurtail_pl.methods.Uniform}"
            )
            continue
        if weights.bits not in BITS:
            yield f"{name} has weights of {weights.bits} bits; vLLM's kernels read 4 and 8: quantize with those"
        if not weights.symmetric and linear.out_features * weights.bits % WORD:
            yield (
                f"{name} has {linear.out_features} outputs with zero points of {weights.bits} bits, and vLLM joins "
                f"linears in words of {WORD} bits: quantize with weights.symmetric: true"
            )


def _scheme(source: Source) -> Iterator[str]:
    """Parts of the scheme that nothing of vLLM's has."""
    scheme = source.scheme
    if scheme.centre:
        yield "centre is true, and vLLM subtracts nothing from what linears read: quantize with centre: false"
    if scheme.side is not None:
        yield f"beside the weights is {scheme.side.sentence()}, which vLLM does not add: quantize with side: null"
    if scheme.prefix is not None:
        yield f"prefix is {scheme.prefix}, tokens with a cache of their own; vLLM has none: quantize with prefix: null"
    if reason := cache_of(scheme.cache).refused:
        yield reason


def _transforms(source: Source) -> Iterator[str]:
    """Linears that cannot have a transform (`compressed_tensors/transform/linear.py`)."""
    architecture = source.architecture
    for transform in transforms_of(source):
        fuse = f"leave {transform.name} out of fusion.online"
        for index, layer in enumerate(source.layers):
            if transform.linear != architecture.output and architecture.has_experts(layer):
                yield f"{transform.name} rotates what experts read, where vLLM has no transforms: {fuse}"
                return
            linear = layer.get_submodule(transform.linear)
            if linear.bias is not None:
                yield (
                    f"{source.layer_name(index)}.{transform.linear} has a bias and an online rotation, "
                    f"{transform.name}; vLLM stops at a bias beside a transform: {fuse}"
                )


def _whole_model(source: Source, dtype: str) -> Iterator[str]:
    """Why what linears read is not quantized at all."""
    if dtype == "float32":
        yield (
            "--to.dtype is float32, and vLLM quantizes activations of models in float16 and bfloat16 alone: export "
            f"with --to.dtype float16, {FLOAT}"
        )
    if source.scheme.static:
        yield f"activation_scales is static; vLLM gives each token its own: quantize with token, {FLOAT}"
    if any(source.architecture.has_experts(layer) for layer in source.layers):
        yield f"experts read quantized activations, for which vLLM has no kernel of few bits: export with {NONE}"


def _quantizers(name: str, form: Form, searched: bool) -> Iterator[str]:
    """Quantizers of activations that a kernel does not have, alone or beside those of the weights."""
    weights, activations = form.weights, form.activations
    assert activations is not None
    if not activations.is_plain:
        yield (
            f"activations are {activations}; vLLM multiplies integers with float scales here: quantize with levels: "
            f"integer and scales: float32, {FLOAT}"
        )
    if activations.bits not in BITS:
        yield f"activations have {activations.bits} bits; vLLM has 4 and 8: quantize with those, {FLOAT}"
    if not activations.symmetric:
        yield f"activations have zero points; vLLM has none: quantize with activations.symmetric: true, {FLOAT}"
    if activations.clip.amount != 1:
        setting = "clips: null and activations.clip.amount" if searched else "activations.clip.amount"
        yield (
            f"{name} clips activations at the {activations.clip}; vLLM's grid ends at the largest magnitude: quantize "
            f"with {setting}: 1.0, {FLOAT}"
        )
    if not weights.symmetric and weights.bits == activations.bits:
        yield (
            f"weights have zero points and {weights.bits} bits, as activations have, which vLLM does not multiply: "
            f"quantize with weights.symmetric: true, {FLOAT}"
        )
    if weights.bits > activations.bits:
        yield (
            f"{name} has weights of {weights.bits} bits and activations of {activations.bits}, which vLLM does not "
            f"multiply: quantize with weights.bits {activations.bits}, {FLOAT}"
        )


def _sizes(name: str, form: Form, linear: QuantizedLinear) -> Iterator[str]:
    """Widths and groups that its kernel does not take."""
    assert form.activations is not None
    weights, activations, bits = form.weights.group_size, form.activations.group_size, form.activations.bits
    if linear.in_features % (INPUT_BITS // bits) or linear.out_features % OUTPUTS:
        yield (
            f"{name} is {linear.out_features} x {linear.in_features}; vLLM's kernel for activations of {bits} bits "
            f"takes multiples of {OUTPUTS} x {INPUT_BITS // bits}: export with {NONE}"
        )
    sizes = [size for size in (weights, activations) if size is not None]
    if sizes and bits == 8:
        yield (
            f"{name} has groups of {sizes[0]} and activations of 8 bits, which vLLM leaves float then: quantize with "
            f"group_size: null and attention_output: token, {FLOAT}"
        )
    if sizes and min(sizes) < SMALLEST_GROUP:
        yield (
            f"{name} has groups of {min(sizes)}; vLLM's kernel for quantized activations takes {SMALLEST_GROUP} and "
            f"more: quantize with group_size: null and attention_output: token, {FLOAT}"
        )
    if weights is not None and activations != weights:
        # It makes scales of groups whole numbers up to 1024, unless each group has a scale of the inputs beside it
        # (`humming/transform.py`, `process_int_weight_scale`).
        yield (
            f"{name} has weights in groups of {weights} and activations in {activations or 'none'}, and vLLM rounds "
            f"the weights' scales then: quantize with weights.group_size: null, or activations.group_size: {weights}, "
            f"{FLOAT}"
        )
