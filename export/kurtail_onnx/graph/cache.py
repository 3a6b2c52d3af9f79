"""The KV cache: quantize new keys and values, pack two codes to a byte, append, unpack what attention reads.

Layout of one array, keys or values of a layer, with ``P`` past and ``T`` present tokens::

    past_key_values.{layer}.key             uint8 [batch, kv_heads, P, head_dim / 2]   (head_dim for 8 bits)
    past_key_values.{layer}.key_scale       float [batch, kv_heads, P, 1]
    past_key_values.{layer}.key_zero_point  uint8 [batch, kv_heads, P, 1]              (absent when symmetric)
    present.{layer}.key, ...                the same with T

The low nibble holds the first half of a head, the high nibble the second. Symmetric codes are stored plus 2^(bits-1).
4-bit types cannot be concatenated and bit operations run on the host under CUDA: so bytes, made by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes, codes_on, dynamic_grid, values_of
from kurtail_pl.maths.quantizers import Quantizer

HEAD_AXIS, TOKEN_AXIS = 1, 2


@dataclass(frozen=True)
class CacheArray:
    """One input and output of the graph that holds part of the cache.

    Args:
        name: within its layer: ``key``, ``key_scale``, ...
        dtype: of its elements.
        heads: KV heads.
        width: last dimension.
    """

    name: str
    dtype: ir.DataType
    heads: int
    width: int

    def past(self, layer: int | str) -> str:
        """Name of the input."""
        return f"past_key_values.{layer}.{self.name}"

    def present(self, layer: int | str) -> str:
        """Name of the output."""
        return f"present.{layer}.{self.name}"

    def shape(self, tokens: str) -> list[int | str]:
        """Dimensions, the dynamic ones by name."""
        return ["batch", self.heads, tokens, self.width]


@dataclass(frozen=True)
class CachePart:
    """How the keys, or the values, of every layer are kept.

    Args:
        name: ``key`` or ``value``.
        quantizer: None for a cache that was never quantized.
        packed: whether codes are kept, or the values that they stand for.
        heads: KV heads.
        head_dim: even where codes of 4 bits are packed.
        dtype: of the computation.
    """

    name: str
    quantizer: Quantizer | None
    packed: bool
    heads: int
    head_dim: int
    dtype: ir.DataType

    @property
    def arrays(self) -> list[CacheArray]:
        """Inputs and outputs of one layer."""
        if self.quantizer is None or not self.packed:
            return [CacheArray(self.name, self.dtype, self.heads, self.head_dim)]
        width = self.head_dim // 2 if self.quantizer.bits == 4 else self.head_dim
        codes = CacheArray(self.name, ir.DataType.UINT8, self.heads, width)
        scale = CacheArray(f"{self.name}_scale", self.dtype, self.heads, 1)
        zero_point = CacheArray(f"{self.name}_zero_point", ir.DataType.UINT8, self.heads, 1)
        return [codes, scale] if self.quantizer.symmetric else [codes, scale, zero_point]


def append(
    g: GraphBuilder, key: ir.Value, value: ir.Value, layer: int, keys: CachePart, values: CachePart
) -> tuple[ir.Value, ir.Value]:
    """Put new keys and values behind the cached ones and return all of them as attention reads them.

    Args:
        g: the graph.
        key: new keys, rotated and centred, ``[batch, kv_heads, tokens, head_dim]``.
        value: new values, as many.
        layer: index.
        keys: how keys are kept.
        values: how values are kept.

    Returns:
        All keys and all values, ``[batch, kv_heads, past + tokens, head_dim]``.
    """
    with g.scope("kv_cache"):
        if keys.quantizer is not None and keys.quantizer == values.quantizer:
            # Both at once: half the nodes, which is what a step of one token costs.
            pieces = _pieces(g, g.op("Concat", key, value, axis=HEAD_AXIS), keys)
            halves = [g.ops("Split", piece, outputs=2, axis=HEAD_AXIS, num_outputs=2) for piece in pieces]
            new_keys, new_values = ([half[number] for half in halves] for number in (0, 1))
        else:
            new_keys, new_values = _pieces(g, key, keys), _pieces(g, value, values)
        return _extended(g, new_keys, layer, keys), _extended(g, new_values, layer, values)


def _pieces(g: GraphBuilder, x: ir.Value, part: CachePart) -> list[ir.Value]:
    """What is kept of new keys or values: an element for each of the part's arrays."""
    if part.quantizer is None:
        return [x]
    grid = dynamic_grid(g, x, part.head_dim, part.quantizer)
    codes = codes_on(g, x, grid, part.quantizer)
    if not part.packed:
        return [values_of(g, codes, grid)]
    pieces = [_pack(g, codes, part.quantizer, part.head_dim), grid.scale]
    return pieces if grid.zero_point is None else [*pieces, g.cast(grid.zero_point, ir.DataType.UINT8)]


def _extended(g: GraphBuilder, pieces: list[ir.Value], layer: int, part: CachePart) -> ir.Value:
    """Append the pieces to the part's arrays; all values, past and new."""
    with g.scope(part.name):
        presents = []
        for new, array in zip(pieces, part.arrays, strict=True):
            past = g.input(array.past(layer), array.dtype, array.shape("past"))
            present = g.op("Concat", past, new, axis=TOKEN_AXIS)
            g.output(present, array.present(layer), array.dtype, array.shape("total"))
            presents.append(present)
        if part.quantizer is None or not part.packed:
            return presents[0]
        stored, scale, *zero_point = presents
        grid = GridNodes(scale, g.cast(zero_point[0], g.dtype) if zero_point else None)
        return values_of(g, _unpack(g, stored, part.quantizer), grid)


def _pack(g: GraphBuilder, codes: ir.Value, quantizer: Quantizer, head_dim: int) -> ir.Value:
    if quantizer.symmetric:
        codes = g.op("Sub", codes, g.scalar(quantizer.code_range[0]))
    if quantizer.bits == 4:
        # One node for three, and exact in every type: no sum is over 255.
        half = np.eye(head_dim // 2, dtype=g.dtype.numpy())
        codes = g.op("MatMul", codes, g.constant(np.vstack([half, 16 * half]), f"constants.float.pack_{head_dim}"))
    return g.cast(codes, ir.DataType.UINT8)


def _unpack(g: GraphBuilder, stored: ir.Value, quantizer: Quantizer) -> ir.Value:
    if quantizer.bits == 4:
        sixteen = g.constant(np.array(16, np.uint8), "constants.uint8.16")
        high = g.op("Div", stored, sixteen)  # of integers: rounded down
        stored = g.op("Concat", g.op("Sub", stored, g.op("Mul", high, sixteen)), high, axis=-1)
    codes = g.cast(stored, g.dtype)
    return g.op("Add", codes, g.scalar(quantizer.code_range[0])) if quantizer.symmetric else codes
