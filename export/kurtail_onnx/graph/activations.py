"""Quantization of what a linear reads, as QuantizeLinear and DequantizeLinear: of each token, or on a static grid.

With a DequantizeLinear directly on a MatMul's input ONNX Runtime does not keep the weights in 4 bits. In the dynamic
form the rows are flattened before and reshaped after. Through such a Reshape it would move one with constant scale and
zero point: the static form multiplies by the scale in a node of its own. A zero point that changes from token to token
cannot be cast to a 4-bit type on CUDA, so the dynamic asymmetric form is arithmetic on floats, with the same codes; so
are all forms in double, which the two operators do not know.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes, codes_on, dynamic_grid, row_scale, values_of
from kurtail_pl.maths.quantizers import Quantizer

CODE_TYPES = {(4, True): ir.DataType.INT4, (8, True): ir.DataType.INT8}
CODE_TYPES |= {(4, False): ir.DataType.UINT4, (8, False): ir.DataType.UINT8}
"""(bits, symmetric) -> the ONNX type of a code; other widths have none."""


class IntegerRows(NamedTuple):
    """Codes ``[rows, n]`` int8, their scales, and the shape of their product as in `fake_quantized`.

    The scales are ``[rows, 1]``, or ``[]`` when static.
    """

    codes: ir.Value
    scale: ir.Value
    shape: ir.Value | None


class Inputs(NamedTuple):
    """What linears that read the same multiply: weights the states, sides, if there are any, what `down` makes of them.

    The states are ``[batch, tokens, in]``, quantized or not, or codes; the other is ``[batch, tokens, rank]``.
    """

    states: ir.Value | IntegerRows
    thin: ir.Value | None = None


def fake_quantized(g: GraphBuilder, x: ir.Value, size: int, quantizer: Quantizer, shape: ir.Value | None) -> ir.Value:
    """Quantize and dequantize each token.

    Args:
        g: the graph.
        x: ``[batch, tokens, size]``.
        size: channels.
        quantizer: bits, symmetry, clip, group.
        shape: int64 ``[batch, tokens, -1]``, to give the rows their shape back; None where batch is 1.
    """
    group = quantizer.group_size or size
    rows = g.reshape(x, -1, group)
    if quantizer.symmetric and not g.double:
        scale = row_scale(g, rows, group, quantizer)
        dtype = CODE_TYPES[quantizer.bits, True]
        codes = g.op("QuantizeLinear", rows, scale, axis=0, output_dtype=int(dtype))
        values = g.op("DequantizeLinear", codes, scale, axis=0)
    else:
        grid = dynamic_grid(g, rows, group, quantizer)
        values = values_of(g, codes_on(g, rows, grid, quantizer), grid)
    return g.reshape(values, 1, -1, size) if shape is None else g.op("Reshape", values, shape)


def fake_quantized_on(g: GraphBuilder, x: ir.Value, grid: GridNodes, quantizer: Quantizer) -> ir.Value:
    """Quantize and dequantize all tokens on one grid.

    Args:
        g: the graph.
        x: ``[batch, tokens, n]``.
        grid: scale ``[]`` and, when asymmetric, zero point ``[]`` in the type of the codes.
        quantizer: bits and symmetry.
    """
    if g.double:
        wide = GridNodes(grid.scale, None if grid.zero_point is None else g.cast(grid.zero_point, g.dtype))
        return values_of(g, codes_on(g, x, wide, quantizer), wide)
    zero_point = [] if grid.zero_point is None else [grid.zero_point]
    dtype = CODE_TYPES[quantizer.bits, quantizer.symmetric]
    codes = g.op("QuantizeLinear", x, grid.scale, *zero_point, output_dtype=int(dtype))
    steps = g.op("DequantizeLinear", codes, g.scalar(1.0), *zero_point)
    return g.op("Mul", steps, grid.scale)


def integer_rows(
    g: GraphBuilder,
    x: ir.Value,
    size: int,
    quantizer: Quantizer,
    shape: ir.Value | None,
    grid: GridNodes | None = None,
) -> IntegerRows:
    """Codes and scales of each token, symmetric, one scale a token or the grid's; arguments as for `fake_quantized`."""
    rows = g.reshape(x, -1, size)
    grid = dynamic_grid(g, rows, size, quantizer) if grid is None else grid
    return IntegerRows(g.cast(codes_on(g, rows, grid, quantizer), ir.DataType.INT8), grid.scale, shape)
