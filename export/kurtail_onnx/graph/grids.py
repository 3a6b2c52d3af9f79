"""Scales and zero points as graph nodes, operation by operation those of `kurtail_pl.maths.quantizers`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.maths.rounding import BORDER

SMALLEST_SCALE = {
    ir.DataType.FLOAT: float(np.finfo(np.float32).tiny),
    # Normal numbers of half precision end where scales of small activations still are.
    ir.DataType.FLOAT16: float(np.finfo(np.float16).smallest_subnormal),
}


class GridNodes(NamedTuple):
    """Scale and zero point (None when symmetric) of every row, ``[..., 1]``, or of all, ``[]``."""

    scale: ir.Value
    zero_point: ir.Value | None


def dynamic_grid(g: GraphBuilder, x: ir.Value, size: int, quantizer: Quantizer) -> GridNodes:
    """Grid of each row of x from the row's own values.

    Args:
        g: the graph.
        x: ``[..., size]``, one scale for each row.
        size: length of a row.
        quantizer: bits, symmetry and clip.
    """
    if quantizer.symmetric:
        limit = _upper(g, g.op("Abs", x), size, quantizer)
        return GridNodes(_nonzero(g, g.op("Div", limit, g.scalar(quantizer.code_range[1]))), None)
    zero = g.scalar(0.0)
    low = g.op("Min", _lower(g, x, size, quantizer), zero)
    high = g.op("Max", _upper(g, x, size, quantizer), zero)
    scale = _nonzero(g, g.op("Div", g.op("Sub", high, low), g.scalar(quantizer.code_range[1])))
    return GridNodes(scale, _nearest(g, g.op("Div", g.op("Neg", low), scale)))


def row_scale(g: GraphBuilder, rows: ir.Value, size: int, quantizer: Quantizer) -> ir.Value:
    """Symmetric scales ``[rows]`` of ``[rows, size]``, for QuantizeLinear; smallest, not 1, for a row of zeros.

    Both make codes of zero, and one Max is cheaper than the comparison that gives 1.
    """
    magnitude = g.op("Abs", rows)
    if quantizer.clip.kind == "ratio":
        limit = _times(g, g.op("ReduceMax", magnitude, g.ints(-1), keepdims=0), quantizer.clip.amount)
    else:
        limit = g.reshape(_upper_quantile(g, magnitude, size, quantizer.clip.amount), -1)
    scale = g.op("Div", limit, g.scalar(quantizer.code_range[1]))
    return g.op("Max", scale, g.scalar(SMALLEST_SCALE[g.dtype]))


def codes_on(g: GraphBuilder, x: ir.Value, grid: GridNodes, quantizer: Quantizer) -> ir.Value:
    """Nearest codes of ``[..., n]``, as floats."""
    codes = _nearest(g, g.op("Div", x, grid.scale))
    if grid.zero_point is not None:
        codes = g.op("Add", codes, grid.zero_point)
    smallest, largest = quantizer.code_range
    return g.op("Clip", codes, g.scalar(smallest), g.scalar(largest))


def values_of(g: GraphBuilder, codes: ir.Value, grid: GridNodes) -> ir.Value:
    """Values of float codes ``[..., n]``."""
    if grid.zero_point is not None:
        codes = g.op("Sub", codes, grid.zero_point)
    return g.op("Mul", codes, grid.scale)


def _nearest(g: GraphBuilder, x: ir.Value) -> ir.Value:
    if g.double:
        x = g.op("Div", g.op("Round", g.op("Mul", x, g.scalar(BORDER))), g.scalar(BORDER))
    return g.op("Round", x)


def _nonzero(g: GraphBuilder, scale: ir.Value) -> ir.Value:
    return g.op("Where", g.op("Greater", scale, g.scalar(0.0)), scale, g.scalar(1.0))


def _upper(g: GraphBuilder, x: ir.Value, size: int, quantizer: Quantizer) -> ir.Value:
    if quantizer.clip.kind == "quantile":
        return _upper_quantile(g, x, size, quantizer.clip.amount)
    return _times(g, g.op("ReduceMax", x, g.ints(-1)), quantizer.clip.amount)


def _lower(g: GraphBuilder, x: ir.Value, size: int, quantizer: Quantizer) -> ir.Value:
    if quantizer.clip.kind == "quantile":
        return g.op("Neg", _upper_quantile(g, g.op("Neg", x), size, quantizer.clip.amount))
    return _times(g, g.op("ReduceMin", x, g.ints(-1)), quantizer.clip.amount)


def _times(g: GraphBuilder, x: ir.Value, ratio: float) -> ir.Value:
    return x if ratio == 1 else g.op("Mul", x, g.scalar(ratio))


def _upper_quantile(g: GraphBuilder, x: ir.Value, size: int, q: float) -> ir.Value:
    """The q-quantile of each row, ``[..., 1]``: the order statistics around it, interpolated as `torch.lerp` does."""
    position = q * (size - 1)
    below = int(position)
    count = size - below
    top, _ = g.ops("TopK", x, g.ints(count), outputs=2)
    lower = g.op("Slice", top, g.ints(count - 1), g.ints(count), g.ints(-1))
    weight = position - below
    if count == 1 or weight == 0:
        return lower
    upper = g.op("Slice", top, g.ints(count - 2), g.ints(count - 1), g.ints(-1))
    step = g.op("Sub", upper, lower)
    if weight < 0.5:
        return g.op("Add", lower, g.op("Mul", step, g.scalar(weight)))
    return g.op("Sub", upper, g.op("Mul", step, g.scalar(1 - weight)))
