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
        hidden = g.op("Add", hidden, attention(step, index, normed), name="attention_residual")
        normed = rms_norm(step, f"{prefix}.{names.mlp_norm}", hidden)
        block = mixture if names.has_experts(source.layers[index]) else mlp
        return g.op("Add", hidden, block(step, index, normed), name="mlp_residual")


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
        return widened(g, rows, stored_dtype(g, source, f"{name}.weight"))


def _require_silu(source: Source) -> None:
    if source.config.hidden_act != "silu":
        raise UnsupportedArchitecture(f"hidden_act is {source.config.hidden_act!r}, expected 'silu'")
