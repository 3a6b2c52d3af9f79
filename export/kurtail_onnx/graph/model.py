"""The whole graph of an artefact: inputs, embedding, decoder layers, head."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
from torch import Tensor

from kurtail_onnx.forms import cache_integers_of
from kurtail_onnx.graph.attention import attention
from kurtail_onnx.graph.builder import FLOATS, GraphBuilder
from kurtail_onnx.graph.cache import CachePart, parts_of
from kurtail_onnx.graph.head import head
from kurtail_onnx.graph.mixture import mixture
from kurtail_onnx.graph.mlp import mlp
from kurtail_onnx.graph.norm import rms_norm
from kurtail_onnx.graph.positions import rotary_tables
from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import stored_dtype, stored_weight, widened
from kurtail_onnx.settings import Settings
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import UnsupportedArchitecture
from kurtail_pl.surgery.families import number_of

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"


def build_model(source: Source, spec: Settings) -> ir.Model:
    """Graph of an artefact; its weights are read when the model is saved.

    One graph serves prefill, chunked prefill and decoding: batch, new tokens and past tokens are dynamic.

    Raises:
        UnsupportedArchitecture: when a part of the family has no graph.
    """
    _require_silu(source)
    g = GraphBuilder(FLOATS[spec.dtype])
    input_ids = g.input(INPUT_IDS, ir.DataType.INT64, ["batch", "tokens"])
    step = _step(g, source, spec, input_ids)
    hidden = _embedding(g, source, input_ids)
    hidden.name = hidden_name(0)
    for index in range(len(source.layers)):
        hidden = decoder_layer(step, index, hidden)
        hidden.name = hidden_name(index + 1)
    logits = head(step, hidden)
    g.output(logits, LOGITS, g.wide, ["batch", "tokens", source.config.vocab_size])
    return g.model({"kurtail.kv": spec.kv, "kurtail.weights": spec.weights, "kurtail.act": spec.act})


def hidden_name(layer: int) -> str:
    """Name of the residual stream before a decoder layer, or, after the last one, before the final norm."""
    return f"hidden.{layer}"


def decoder_layer(step: Step, index: int, hidden: ir.Value) -> ir.Value:
    """Hidden states after a decoder layer, ``[batch, tokens, hidden]``."""
    g, source, names = step.g, step.source, step.source.architecture
    prefix = source.layer_name(index)
    with g.scope(names.layers.replace(".", "/") + f".{index}"):
        normed = rms_norm(step, f"{prefix}.{names.attention_norm}", hidden)
        written = g.times(attention(step, index, normed), number_of(source.config, names.residual_multiplier))
        hidden = g.op("Add", hidden, written, name="attention_residual")
        normed = rms_norm(step, f"{prefix}.{names.mlp_norm}", hidden)
        block = mixture if names.has_experts(source.layers[index]) else mlp
        written = g.times(block(step, index, normed), number_of(source.config, names.residual_multiplier))
        return g.op("Add", hidden, written, name="mlp_residual")


def cache_parts(source: Source, spec: Settings) -> list[CachePart]:
    """How keys and values are kept."""
    cache = cache_integers_of(source.scheme.cache)
    assert cache is not None
    return parts_of(cache, spec.kv == "packed", source.kv_heads, source.head_dim, FLOATS[spec.dtype])


def _step(g: GraphBuilder, source: Source, spec: Settings, input_ids: ir.Value) -> Step:
    attention_mask = g.input(ATTENTION_MASK, ir.DataType.INT64, ["batch", "total"])
    position_ids = g.input(POSITION_IDS, ir.DataType.INT64, ["batch", "tokens"])
    with g.root_scope("model"):
        shape = g.op("Concat", g.op("Shape", input_ids), g.ints(-1), axis=0, name="token_shape")
    cache, rotary = cache_parts(source, spec), rotary_tables(source)
    return Step(g, source, spec, cache, position_ids, attention_mask, rotary, shape)


def _embedding(g: GraphBuilder, source: Source, input_ids: ir.Value) -> ir.Value:
    name = source.architecture.embedding
    shape = tuple(cast(Tensor, source.model.get_submodule(name).weight).shape)
    with g.root_scope(*name.split(".")):
        rows = g.op("Gather", stored_weight(g, source, f"{name}.weight", shape), input_ids)
        rows = widened(g, rows, stored_dtype(g, source, f"{name}.weight"))
        return g.times(rows, number_of(source.config, source.architecture.embedding_multiplier))


def _require_silu(source: Source) -> None:
    if source.architecture.gate is None:
        raise UnsupportedArchitecture(
            f"an MLP of a {source.config.model_type} has no gate, and those of a graph have one; use another exporter"
        )
    if source.architecture.rigid_residual is not None:
        raise UnsupportedArchitecture(
            f"a {source.config.model_type} has norms of what its blocks write, and a graph has none; use "
            "kurtail_pl.load, or another exporter"
        )
    if source.architecture.learned_sinks:
        raise UnsupportedArchitecture(
            f"the attention of a {source.config.model_type} has learned sinks, and that of a graph has none; use "
            "another exporter"
        )
    if source.architecture.whole_norms:
        raise UnsupportedArchitecture(
            f"a {source.config.model_type} has norms of all heads at once, and a graph those of single heads; use "
            "another exporter"
        )
    if source.architecture.routing != "softmax":
        raise UnsupportedArchitecture(
            f"the router of a {source.config.model_type} weighs experts by sigmoids, and that of a graph by a softmax; "
            "use another exporter"
        )
    if source.config.hidden_act != "silu":
        raise UnsupportedArchitecture(f"hidden_act is {source.config.hidden_act!r}, expected 'silu'")
