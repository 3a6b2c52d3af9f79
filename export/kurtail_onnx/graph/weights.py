"""Weights of the artefact as initializers, each read, laid out and written alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from kurtail_onnx.graph.builder import Array, GraphBuilder
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import half_or_float


def float_weight(
    g: GraphBuilder, source: Source, name: str, shape: tuple[int, ...], transposed: bool = False
) -> ir.Value:
    """A float weight in the dtype of the computation; narrower ones of the artefact are stored as they are and cast.

    Args:
        g: the graph.
        source: the artefact.
        name: of the tensor in the artefact, and of the initializer.
        shape: in the artefact.
        transposed: store ``[in, out]``.
    """
    return widened(g, stored_weight(g, source, name, shape, transposed), stored_dtype(g, source, name))


def stored_weight(
    g: GraphBuilder, source: Source, name: str, shape: tuple[int, ...], transposed: bool = False
) -> ir.Value:
    """The initializer alone, in `stored_dtype`."""

    def read() -> Tensor:
        tensor = source.tensor(name)
        return tensor.mT if transposed else tensor

    return initializer(g, name, stored_dtype(g, source, name), shape[::-1] if transposed else shape, read)


def stored_dtype(g: GraphBuilder, source: Source, name: str) -> ir.DataType:
    """Type of a float weight in the file: never wider than in the artefact."""
    if source.dtype(name) == torch.float16:
        return ir.DataType.FLOAT16
    return ir.DataType.FLOAT if g.double else g.dtype


def widened(g: GraphBuilder, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A float x of some dtype in that of the computation."""
    return x if dtype == g.dtype else g.cast(x, g.dtype)


def initializer(
    g: GraphBuilder, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Tensor]
) -> ir.Value:
    """An initializer whose torch tensor is read when the file is written.

    Args:
        g: the graph.
        name: of the initializer.
        dtype: in the file; floats are cast, 4-bit types take codes of 8 bits and are packed.
        shape: in the file.
        read: gives the tensor.

    Raises:
        ConfigError: when it is written, and float16 does not hold it.
    """

    def load() -> ir.TensorProtocol:
        tensor = read()
        if dtype == ir.DataType.FLOAT16:
            _require_half(name, tensor)
        array = np.ascontiguousarray(tensor.numpy()).reshape(shape)
        if dtype.bitwidth == 4:
            return ir.PackedTensor(pack_neighbours(array), dtype, shape=tuple(shape))
        return ir.Tensor(array.astype(dtype.numpy(), copy=False))

    return g.weight(name, dtype, shape, load)


def _require_half(name: str, tensor: Tensor) -> None:
    if half_or_float(tensor).dtype != torch.float16:
        ends = torch.aminmax(tensor.abs())
        raise ConfigError(
            f"{name} has values of {ends.min:.3g} to {ends.max:.3g} in size, which float16 does not hold; "
            "export with --to.dtype fp32"
        )


def pack_neighbours(codes: Array) -> Array:
    """ONNX's packing of 4-bit types: two neighbours in memory to a byte, the first in the low nibble."""
    flat = codes.reshape(-1).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: Array = (flat[0::2] & 0xF) | (flat[1::2] << 4)
    return packed
