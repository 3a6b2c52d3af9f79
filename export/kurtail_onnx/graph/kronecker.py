"""Learned maps at run time (FlatQuant), each of its own layer and place: of what linears read, keys and queries."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.hadamard import DENSE_SIZE
from kurtail_onnx.graph.weights import initializer
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.surgery.online import OnlineKronecker


def mapped_inputs(g: GraphBuilder, source: Source, reader: str, x: ir.Value, transform: OnlineKronecker) -> ir.Value:
    """What a linear reads behind its map: ``left^T X right`` of each token, or one product where the map is small.

    Args:
        g: the graph.
        source: the artefact.
        reader: the linear, by its name in the whole model.
        x: ``[batch, tokens, n]``, or the same in more dimensions, of which the last is the fastest.
        transform: its map, for its orders.

    Returns:
        ``[batch, tokens, n]``, or ``[batch, tokens, a, b]``.
    """
    name, rows, columns = f"{reader}.transform", len(transform.left), len(transform.right)
    with g.scope("transform"):
        if rows * columns <= DENSE_SIZE:
            x = g.reshape(x, 0, 0, rows * columns)
            return g.op("MatMul", x, _square(g, f"{name}.dense", rows * columns, lambda: _map(source, name).dense()))
        x = g.reshape(x, 0, 0, rows, columns)
        if not torch.equal(source.tensor(f"{name}.right"), torch.eye(columns)):  # Which mixes heads alone.
            x = g.op("MatMul", x, _square(g, f"{name}.right", columns, lambda: _map(source, name).right))
        return g.op("MatMul", _square(g, f"{name}.left", rows, lambda: _map(source, name).left.mT), x)


def mapped_heads(g: GraphBuilder, source: Source, attention: str, query: ir.Value, key: ir.Value) -> list[ir.Value]:
    """Queries and keys ``[batch, heads, tokens, head_dim]`` behind the map of keys and its transposed inverse.

    Args:
        g: the graph.
        source: the artefact.
        attention: the module, by its name in the whole model.
        query: behind R3, as the keys are.
        key: not centred.
    """
    name, size = f"{attention}.key_transform", source.head_dim
    turns = {
        f"{attention}.query_transform": (query, lambda: _map(source, name).inverse_transposed().dense()),
        name: (key, lambda: _map(source, name).dense()),
    }
    with g.scope("key_transform"):
        return [g.op("MatMul", heads, _square(g, of, size, read)) for of, (heads, read) in turns.items()]


def _square(g: GraphBuilder, name: str, size: int, read: Callable[[], Tensor]) -> ir.Value:
    """A matrix in the type of the computation."""
    return initializer(g, name, g.dtype, (size, size), read)


def _map(source: Source, name: str) -> Kronecker:
    """In double: the matrices that are made of its factors are rounded once."""
    return Kronecker(*(source.tensor(f"{name}.{side}").double() for side in ("left", "right")))
