"""Where tokens are: rotary tables from transformers' own module, and the mask of causal and windowed attention."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_onnx.graph.source import Source
from kurtail_onnx.graph.step import Step
from kurtail_pl.errors import UnsupportedArchitecture

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary types whose angles depend on a token's position alone."""


def rope(step: Step, x: ir.Value) -> ir.Value:
    """Rotate queries or keys ``[batch, heads, tokens, head_dim]``, or the first part of each head, by position."""
    cos = step.shared("rotary.cos", lambda: _table(step, "cos"))
    sin = step.shared("rotary.sin", lambda: _table(step, "sin"))
    assert cos.const_value is not None
    width = 2 * cos.const_value.numpy().shape[-1]
    return step.g.op("RotaryEmbedding", x, cos, sin, step.position_ids, rotary_embedding_dim=width)


def _table(step: Step, name: str) -> ir.Value:
    cos, sin = rotary_tables(step.source)
    table = {"cos": cos, "sin": sin}[name]
    return step.g.constant(table.numpy().astype(step.g.dtype.numpy()), f"rotary.{name}")


def rotary_tables(source: Source) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, ``[positions, rotary_dim / 2]`` float32, scaling applied.

    Raises:
        UnsupportedArchitecture: when the angles depend on more than the position.
    """
    module = source.model.get_submodule(source.architecture.rotary)
    kind = getattr(module, "rope_type", "default")
    if kind not in STATIC_ROPE:
        raise UnsupportedArchitecture(
            f"rotary type {kind!r} changes with the length of the text; exported are {', '.join(STATIC_ROPE)}"
        )
    cos, sin = module(torch.zeros(1), torch.arange(source.config.max_position_embeddings)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def window_of(config: PretrainedConfig, layer: int) -> int | None:
    """Tokens that a layer looks back, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def mask(step: Step, window: int | None) -> ir.Value:
    """Boolean ``[batch, 1, tokens, past + tokens]``, True where a query sees a key; one for each window.

    A query always sees itself: padding would otherwise see nothing, and the softmax of nothing is not a number.
    """
    name = "mask" if window is None else f"mask_{window}"
    return step.shared(name, lambda: _mask(step, window))


def _mask(step: Step, window: int | None) -> ir.Value:
    g = step.g
    total = g.op("Squeeze", g.op("Shape", step.attention_mask, start=1), g.ints(0))
    tokens = g.op("Squeeze", g.op("Shape", step.position_ids, start=1), g.ints(0))
    slots = g.op("Range", g.index(0), total, g.index(1))
    queries = g.op("Range", g.op("Sub", total, tokens), total, g.index(1))
    queries = g.op("Unsqueeze", queries, g.ints(1))
    seen = g.op("LessOrEqual", slots, queries)
    if window is not None:
        seen = g.op("And", seen, g.op("Greater", slots, g.op("Sub", queries, g.index(window))))
    real = g.op("Unsqueeze", g.cast(step.attention_mask, ir.DataType.BOOL), g.ints(1, 2))
    return g.op("And", seen, g.op("Or", real, g.op("Equal", slots, queries)))
