"""Where tokens are: rotary tables from transformers' own module, and the mask of causal and windowed attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_onnx.graph.step import Step
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import UnsupportedArchitecture
from kurtail_pl.surgery.positions import LONGROPE, positions_of, rotary_border

STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic", "ntk_alpha")
"""Rotary types whose angles depend on a token's position alone, up to the model's positions.

Those of the type dynamic are scaled in longer texts only, which the runner refuses.
"""


def rope(step: Step, x: ir.Value) -> ir.Value:
    """Rotate queries or keys ``[batch, heads, tokens, head_dim]``, or the first part of each head, by position."""
    g = step.g
    cos, sin = (
        g.constant(table.numpy().astype(g.dtype.numpy()), f"rotary.{name}")
        for name, table in zip(("cos", "sin"), step.rotary, strict=True)
    )
    border = rotary_border(step.source.config)
    rows = step.position_ids
    if border is not None:
        rows = step.shared("rotary_rows", lambda: _longrope_rows(step, border))
    half: int = step.rotary[0].shape[-1]
    if g.double:
        return _rope_in_double(step, x, [g.op("Gather", table, rows) for table in (cos, sin)], half)
    return g.op("RotaryEmbedding", x, cos, sin, rows, rotary_embedding_dim=2 * half)


def _rope_in_double(step: Step, x: ir.Value, angles: Sequence[ir.Value], half: int) -> ir.Value:
    """RotaryEmbedding, which has no double, written out; angles are cosines and sines ``[batch, tokens, half]``."""
    g = step.g
    cos, sin = (g.op("Unsqueeze", angle, g.ints(1)) for angle in angles)
    sizes = g.ints(half, half, step.source.head_dim - 2 * half)
    low, high, rest = g.ops("Split", x, sizes, outputs=3, axis=-1)
    turned_low = g.op("Sub", g.op("Mul", low, cos), g.op("Mul", high, sin))
    turned_high = g.op("Add", g.op("Mul", high, cos), g.op("Mul", low, sin))
    return g.op("Concat", turned_low, turned_high, rest, axis=-1)


def rotary_tables(source: Source) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, ``[positions, rotary_dim / 2]`` float32, scaling applied.

    Of the type longrope, those of short texts stand before those of long ones.

    Raises:
        UnsupportedArchitecture: when the rotary type is another.
    """
    module, kind = source.model.get_submodule(source.architecture.rotary), rope_type(source)
    if kind not in (*STATIC_ROPE, LONGROPE):
        raise UnsupportedArchitecture(f"rotary type is {kind!r}, expected one of {', '.join((*STATIC_ROPE, LONGROPE))}")
    border = rotary_border(source.config)
    lengths = [*([] if border is None else [border]), positions_of(source.config)]
    pairs = [module(torch.zeros(1), torch.arange(length)[None]) for length in lengths]
    cos, sin = (torch.cat([pair[part][0] for pair in pairs]) for part in (0, 1))
    half = cos.shape[-1] // 2
    return cos[:, :half], sin[:, :half]


def scaled_by_position(step: Step, query: ir.Value) -> ir.Value:
    """Queries ``[batch, heads, tokens, head_dim]`` as they grow with their position, where the record says so."""
    g, config, name = step.g, step.source.config, step.source.architecture.query_scale
    if name is None:
        return query
    beta, original = (config.rope_parameters[key] for key in (name, "original_max_position_embeddings"))
    table = 1 + beta * torch.log(1 + torch.floor(torch.arange(positions_of(config)) / original))

    def factors() -> ir.Value:
        scales = g.constant(table.numpy().astype(g.dtype.numpy()), "query_scales")
        return g.op("Unsqueeze", g.op("Gather", scales, step.position_ids), g.ints(1, 3))

    return g.op("Mul", query, step.shared("query_scale", factors))


def rope_type(source: Source) -> str:
    """How a model's angles are scaled, by transformers' name."""
    kind: str = getattr(source.model.get_submodule(source.architecture.rotary), "rope_type", "default")
    return kind


def _longrope_rows(step: Step, border: int) -> ir.Value:
    """Rows of the tables, ``[batch, tokens]``: those of long texts when any position is beyond the border.

    What the cache holds keeps its angles: the runner makes it anew when a text crosses the border.
    """
    g, original = step.g, step.g.index(border)
    last = g.op("ReduceMax", step.position_ids, keepdims=0)
    shift = g.op("Where", g.op("Greater", original, last), g.index(0), original)
    return g.op("Add", step.position_ids, shift)


def window_of(config: PretrainedConfig, layer: int) -> int | None:
    """Tokens that a layer looks back, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def mask(step: Step, window: int | None) -> ir.Value:
    """Boolean ``[batch, 1, tokens, past + tokens]``, True where a query sees a key; one for each window.

    A query always sees itself: padding would otherwise see nothing, and the softmax of nothing is not a number. All see
    the prefix, whose columns come first where there is one.
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
    seen = g.op("And", seen, g.op("Or", real, g.op("Equal", slots, queries)))
    return seen if step.source.scheme.prefix is None else _behind_prefix(step, seen, len(step.source.scheme.prefix))


def _behind_prefix(step: Step, seen: ir.Value, size: int) -> ir.Value:
    """Columns of True before those of the text."""
    g = step.g
    batch, tokens = g.op("Shape", step.position_ids, end=1), g.op("Shape", step.position_ids, start=1)
    shape = g.op("Concat", batch, g.ints(1), tokens, g.ints(size), axis=0)
    columns = g.op("Expand", g.constant(np.array(True), "constants.bool.true"), shape)
    return g.op("Concat", columns, seen, axis=3)
