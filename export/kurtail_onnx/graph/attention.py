"""The attention block: projections, rotary embedding, R3, maps, centres, cache, prefix, attention, R4, output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import onnx_ir as ir

from kurtail_onnx.forms import cache_integers_of
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.cache import append
from kurtail_onnx.graph.hadamard import dense_hadamard, hadamard
from kurtail_onnx.graph.kronecker import mapped_heads
from kurtail_onnx.graph.norm import rms_norm
from kurtail_onnx.graph.positions import mask, rope, scaled_by_position, window_of
from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import float_weight
from kurtail_pl.methods import CacheFormat


def attention(step: Step, index: int, x: ir.Value) -> ir.Value:
    """What a layer's attention adds to the residual stream.

    Args:
        step: what layers share.
        index: of the layer.
        x: normed block input, ``[batch, tokens, hidden]``.
    """
    g, source, names = step.g, step.source, step.source.architecture
    module = source.layers[index].get_submodule(names.attention)
    with g.scope(names.attention):
        query, key, value = _projections(step, index, x)
        # Layers differ by their clips where these were searched.
        own = cache_integers_of(cast(CacheFormat | None, module.cache))
        assert own is not None
        keys, values = append(g, (_centred(step, index, key), value), index, step.cache, own)
        if source.scheme.prefix is not None:
            keys, values = (_behind_prefix(step, index, *part) for part in (("key", keys), ("value", values)))
        seen = mask(step, window_of(source.config, index))
        scale = cast(float, module.scaling)
        if g.double:  # an attribute is float32
            query, scale = g.op("Mul", query, g.scalar(scale)), 1.0
        mixed = g.op("Attention", query, keys, values, seen, scale=scale)
        mixed, factors = g.op("Transpose", mixed, perm=[0, 2, 1, 3]), source.rotations.attention_output
        if factors is None:
            mixed = g.reshape(mixed, 0, 0, -1)
        else:
            mixed = hadamard(g, mixed, factors, "attention_output_R4")
        name = f"{source.layer_name(index)}.{names.output}"
        return step.linear(name, step.read(mixed, name, "o_in"))


def _projections(step: Step, index: int, x: ir.Value) -> Sequence[ir.Value]:
    """Queries, keys and values, ``[batch, heads, tokens, head_dim]`` each; queries and keys are rotated and mapped."""
    g, source = step.g, step.source
    names = [f"{source.layer_name(index)}.{name}" for name in source.architecture.attention_readers]
    read = step.read(x, names[0], "qkv_in")
    states: Sequence[ir.Value] = [step.linear(name, read) for name in names]
    # All heads at once: of a single token it is the number of nodes that costs.
    joined = states[0] if len(states) == 1 else g.op("Concat", *states, axis=-1)
    heads = g.op("Transpose", g.reshape(joined, 0, 0, -1, source.head_dim), perm=[0, 2, 1, 3])
    turned, value = _split(g, heads, source.heads + source.kv_heads, source.kv_heads)
    query, key = _split(g, _rotated(step, index, turned), source.heads, source.kv_heads)
    module = f"{source.layer_name(index)}.{source.architecture.attention}"
    if hasattr(source.model.get_submodule(module), "key_transform"):
        query, key = mapped_heads(g, source, module, query, key)
    return scaled_by_position(step, query), key, value


def _rotated(step: Step, index: int, heads: ir.Value) -> ir.Value:
    """Heads of queries and then of keys after their norms, the rotary embedding and R3, each where the model has it.

    Once normed they are turned alike: all heads at once, which for a single token costs as much as the keys' alone.
    """
    g, source, names = step.g, step.source, step.source.architecture
    if names.head_norms and not names.norms_after_rope:
        heads = _normed(step, index, heads)
    if getattr(source.layers[index].get_submodule(names.attention), "use_rope", True):
        heads = rope(step, heads)
    if names.norms_after_rope:
        heads = _normed(step, index, heads)
    if source.rotations.query_key is not None:
        heads = dense_hadamard(g, heads, source.rotations.query_key, "query_key_R3")
    return heads


def _normed(step: Step, index: int, heads: ir.Value) -> ir.Value:
    """Heads of queries and of keys behind their norms."""
    g, source = step.g, step.source
    norms = [f"{source.layer_name(index)}.{name}" for name in source.architecture.head_norms]
    parts = _split(g, heads, source.heads, source.kv_heads)
    return g.op("Concat", *(rms_norm(step, *each) for each in zip(norms, parts, strict=True)), axis=1)


def _split(g: GraphBuilder, heads: ir.Value, first: int, second: int) -> Sequence[ir.Value]:
    """The first so many heads and the others."""
    return g.ops("Split", heads, g.ints(first, second), outputs=2, axis=1)


def _centred(step: Step, index: int, key: ir.Value) -> ir.Value:
    """Rotated keys less the constant of their KV head, where the scheme says so; the softmax takes no notice."""
    g, source = step.g, step.source
    if not source.scheme.centre_keys:
        return key
    name = f"{source.layer_name(index)}.{source.architecture.attention}.key_centre"
    with g.scope("key_centre"):
        return g.op("Sub", key, float_weight(g, source, name, (source.kv_heads, 1, source.head_dim)))


def _behind_prefix(step: Step, index: int, part: str, states: ir.Value) -> ir.Value:
    """Keys or values of the prefix, which no cache holds, and then all of the text, ``[batch, kv_heads, all, dim]``."""
    g, source = step.g, step.source
    assert source.scheme.prefix is not None
    shape = (source.kv_heads, len(source.scheme.prefix), source.head_dim)

    def batch() -> ir.Value:
        return g.op("Concat", g.op("Shape", step.attention_mask, start=0, end=1), g.ints(1, 1, 1), axis=0)

    with g.scope("prefix"):
        name = f"{source.layer_name(index)}.{source.architecture.attention}.prefix_{part}"
        prefix = g.op("Expand", float_weight(g, source, name, shape), step.shared("batch", batch))
        return g.op("Concat", prefix, states, axis=2)
