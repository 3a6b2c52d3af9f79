"""The KV cache: quantize new keys and values, pack two codes to a byte, append, unpack what attention reads.

Layout of the arrays of a layer, with ``P`` past and ``T`` present tokens; heads are those of keys, then of values::

    past_key_values.{layer}.key_value             uint8 [batch, 2 kv_heads, P, head_dim / 2]   (head_dim for 8 bits)
    past_key_values.{layer}.key_value_scale       float [batch, 2 kv_heads, P, 1]
    past_key_values.{layer}.key_value_zero_point  uint8 [batch, 2 kv_heads, P, 1]              (absent when symmetric)
    present.{layer}.key_value, ...                the same with T

Keys and values of different bits, and a float cache, have arrays of their own, ``key`` and ``value``. The low nibble
holds the first half of a head, the high nibble the second. Symmetric codes are stored plus 2^(bits-1). 4-bit types
cannot be concatenated and bit operations run on the host under CUDA: so bytes, made by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kurtail_onnx.forms import CacheIntegers
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes, codes_on, dynamic_grid, values_of
from kurtail_pl.maths.quantizers import Quantizer

HEAD_AXIS, TOKEN_AXIS = 1, 2
STATES = ("key", "value")


@dataclass(frozen=True)
class CacheArray:
    """One input and output of the graph that holds part of the cache.

    Args:
        name: within its layer: ``key``, ``key_scale``, ...
        dtype: of its elements.
        heads: all that it holds.
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
    """How the keys, or the values, or both of every layer are kept.

    Args:
        states: ``key``, ``value``, or both, in the order of the heads.
        quantizer: bits and symmetry of all; layers may have clips of their own. None where it was never quantized.
        packed: whether codes are kept, or the values that they stand for.
        heads: KV heads of each state.
        head_dim: even where codes of 4 bits are packed.
        dtype: of the computation.
    """

    states: tuple[str, ...]
    quantizer: Quantizer | None
    packed: bool
    heads: int
    head_dim: int
    dtype: ir.DataType

    @property
    def name(self) -> str:
        """Of its first array: ``key``, ``value`` or ``key_value``."""
        return "_".join(self.states)

    @property
    def codes(self) -> bool:
        """Whether its first array holds codes."""
        return self.packed and self.quantizer is not None

    @property
    def arrays(self) -> list[CacheArray]:
        """Inputs and outputs of one layer."""
        heads = self.heads * len(self.states)
        if self.quantizer is None or not self.packed:
            return [CacheArray(self.name, self.dtype, heads, self.head_dim)]
        width = self.head_dim // 2 if self.quantizer.bits == 4 else self.head_dim
        codes = CacheArray(self.name, ir.DataType.UINT8, heads, width)
        scale = CacheArray(f"{self.name}_scale", self.dtype, heads, 1)
        zero_point = CacheArray(f"{self.name}_zero_point", ir.DataType.UINT8, heads, 1)
        return [codes, scale] if self.quantizer.symmetric else [codes, scale, zero_point]


def parts_of(cache: CacheIntegers, packed: bool, heads: int, head_dim: int, dtype: ir.DataType) -> list[CachePart]:
    """How keys and values are kept: in the same arrays where their codes are alike; arguments as for `CachePart`."""
    codes = {(q.bits, q.symmetric) for q in cache if q is not None}
    if packed and None not in cache and len(codes) == 1:
        return [CachePart(STATES, cache.keys, packed, heads, head_dim, dtype)]
    return [CachePart((name,), q, packed, heads, head_dim, dtype) for name, q in zip(STATES, cache, strict=True)]


def append(
    g: GraphBuilder, new: tuple[ir.Value, ir.Value], layer: int, parts: Sequence[CachePart], own: CacheIntegers
) -> Sequence[ir.Value]:
    """Put new keys and values behind the cached ones and return all of them as attention reads them.

    Args:
        g: the graph.
        new: keys, rotated and centred, and values, ``[batch, kv_heads, tokens, head_dim]``.
        layer: index.
        parts: how they are kept.
        own: the layer's quantizers.

    Returns:
        All keys and all values, ``[batch, kv_heads, past + tokens, head_dim]``.
    """
    with g.scope("kv_cache"):
        pieces = _joined(g, new, parts[0], own) if own.keys == own.values else None
        if len(parts) == 1:
            pieces = pieces or _beside(g, [_pieces(g, x, parts[0], q) for x, q in zip(new, own, strict=True)])
            return _halves(g, _extended(g, pieces, layer, parts[0]))
        if pieces is None:
            apart = [_pieces(g, x, part, q) for x, part, q in zip(new, parts, own, strict=True)]
        else:
            apart = [list(pair) for pair in zip(*(_halves(g, piece) for piece in pieces), strict=True)]
        return [_extended(g, each, layer, part) for each, part in zip(apart, parts, strict=True)]


def _joined(
    g: GraphBuilder, new: tuple[ir.Value, ir.Value], part: CachePart, own: CacheIntegers
) -> list[ir.Value] | None:
    """Pieces of keys and values at once: half the nodes, which is what a step of one token costs."""
    return None if own.keys is None else _pieces(g, g.op("Concat", *new, axis=HEAD_AXIS), part, own.keys)


def _beside(g: GraphBuilder, pieces: list[list[ir.Value]]) -> list[ir.Value]:
    return [g.op("Concat", *pair, axis=HEAD_AXIS) for pair in zip(*pieces, strict=True)]


def _halves(g: GraphBuilder, piece: ir.Value) -> Sequence[ir.Value]:
    """What belongs to keys and what to values."""
    return g.ops("Split", piece, outputs=2, axis=HEAD_AXIS, num_outputs=2)


def _pieces(g: GraphBuilder, x: ir.Value, part: CachePart, quantizer: Quantizer | None) -> list[ir.Value]:
    """What is kept of new keys or values: an element for each of the part's arrays."""
    if quantizer is None:
        return [x]
    grid = dynamic_grid(g, x, part.head_dim, quantizer)
    codes = codes_on(g, x, grid, quantizer)
    if not part.packed:
        return [values_of(g, codes, grid)]
    pieces = [_pack(g, codes, quantizer, part.head_dim), grid.scale]
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
