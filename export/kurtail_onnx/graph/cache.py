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

import onnx_ir as ir

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes, codes_on, dynamic_grid, values_of
from kurtail_pl.maths.quantizers import Quantizer

TOKEN_AXIS = 2


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


def append(g: GraphBuilder, x: ir.Value, layer: int, part: CachePart) -> ir.Value:
    """Put new keys or values behind the cached ones and return all of them as attention reads them.

    Args:
        g: the graph.
        x: new keys (rotated) or values, ``[batch, kv_heads, tokens, head_dim]``.
        layer: index.
        part: keys or values.

    Returns:
        ``[batch, kv_heads, past + tokens, head_dim]``.
    """
    with g.scope("kv_cache"), g.scope(part.name):
        if part.quantizer is None:
            return _append_arrays(g, [x], layer, part)[0]
        grid = dynamic_grid(g, x, part.head_dim, part.quantizer)
        codes = codes_on(g, x, grid, part.quantizer)
        if not part.packed:
            return _append_arrays(g, [values_of(g, codes, grid)], layer, part)[0]
        pieces = [_pack(g, codes, part.quantizer), grid.scale]
        if grid.zero_point is not None:
            pieces.append(g.cast(grid.zero_point, ir.DataType.UINT8))
        stored, scale, *zero_point = _append_arrays(g, pieces, layer, part)
        present = GridNodes(scale, g.cast(zero_point[0], g.dtype) if zero_point else None)
        return values_of(g, _unpack(g, stored, part.quantizer), present)


def _append_arrays(g: GraphBuilder, pieces: list[ir.Value], layer: int, part: CachePart) -> list[ir.Value]:
    presents = []
    for new, array in zip(pieces, part.arrays, strict=True):
        past = g.input(array.past(layer), array.dtype, array.shape("past"))
        present = g.op("Concat", past, new, axis=TOKEN_AXIS)
        g.output(present, array.present(layer), array.dtype, array.shape("total"))
        presents.append(present)
    return presents


def _pack(g: GraphBuilder, codes: ir.Value, quantizer: Quantizer) -> ir.Value:
    if quantizer.symmetric:
        codes = g.op("Sub", codes, g.scalar(quantizer.code_range[0]))
    if quantizer.bits == 4:
        low, high = g.ops("Split", codes, outputs=2, axis=-1, num_outputs=2)
        codes = g.op("Add", low, g.op("Mul", high, g.scalar(16.0)))
    return g.cast(codes, ir.DataType.UINT8)


def _unpack(g: GraphBuilder, stored: ir.Value, quantizer: Quantizer) -> ir.Value:
    codes = g.cast(stored, g.dtype)
    if quantizer.bits == 4:
        high = g.op("Floor", g.op("Div", codes, g.scalar(16.0)))
        low = g.op("Sub", codes, g.op("Mul", high, g.scalar(16.0)))
        codes = g.op("Concat", low, high, axis=-1)
    if quantizer.symmetric:
        codes = g.op("Add", codes, g.scalar(quantizer.code_range[0]))
    return codes
