"""`kurtail::Hadamard`: an online rotation as one node, whose function body any runtime can inline.

``Hadamard(X, Left, Right)`` reshapes each token, or each block of it, to ``[a, b]`` and computes ``Left X Right``; who
reads it, a quantizer, reshapes anyway. ``DenseHadamard(X, Matrix)`` is one product, faster where the matrix is small,
and of a single token it is the number of nodes that costs. Both are model-local functions: nothing
needs to be installed, a viewer shows one node for each rotation, and a library of custom operators can claim the node
later. Random signs are inside the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from kurtail_onnx.graph.builder import OPSET, GraphBuilder
from kurtail_pl.maths.hadamard import HadamardFactors

DOMAIN, FACTORED, DENSE = "kurtail", "Hadamard", "DenseHadamard"
DENSE_SIZE = 128
"""Up to this order one dense product beats two products of small blocks and two reshapes."""


def hadamard(g: GraphBuilder, x: ir.Value, factors: HadamardFactors, name: str) -> ir.Value:
    """Rotate tokens by ``kron(I, left, right)``.

    Args:
        g: the graph.
        x: ``[batch, tokens, ...]``, n values a token.
        factors: of order n; the matrices are initializers shared by all nodes of one `name`.
        name: our name and the paper's number, such as ``mlp_hidden_R5``.

    Returns:
        ``[batch, tokens, n]``, or the same in more dimensions, of which the last is the fastest.
    """
    blocks = () if factors.blocks == 1 else (factors.blocks,)
    if factors.block <= DENSE_SIZE:
        return dense_hadamard(g, g.reshape(x, 0, 0, *blocks, factors.block), replace(factors, blocks=1), name)
    dtype, stored = g.dtype.numpy(), f"kurtail.hadamard.{name}"
    rows, columns = factors.left.shape[0], factors.right.shape[0]
    # hadamard_transform computes left^T X right: the transpose is stored.
    left = g.constant(factors.left.mT.numpy().astype(dtype), f"{stored}.left")
    right = g.constant(factors.right.numpy().astype(dtype), f"{stored}.right")
    shape = [0, 0, *blocks, rows, columns]
    return g.call(_factored_function(), x, left, right, name=f"{name}/Hadamard", split_shape=shape)


def dense_hadamard(g: GraphBuilder, x: ir.Value, factors: HadamardFactors, name: str) -> ir.Value:
    """Rotate the last dimension of ``[..., n]`` by one product; arguments as for `hadamard`."""
    matrix = g.constant(factors.dense().numpy().astype(g.dtype.numpy()), f"kurtail.hadamard.{name}.dense")
    return g.call(_dense_function(), x, matrix, name=f"{name}/Hadamard")


def _factored_function() -> ir.Function:
    """Reshape, MatMul, MatMul; a zero in the shape keeps that dimension."""
    x, left, right = (ir.Value(name=name) for name in ("X", "Left", "Right"))
    shape = ir.node("Constant", [], {"value_ints": ir.RefAttr("value_ints", "split_shape", ir.AttributeType.INTS)})
    split = ir.node("Reshape", [x, *shape.outputs])
    by_right = ir.node("MatMul", [*split.outputs, right])
    by_left = ir.node("MatMul", [left, *by_right.outputs])
    return _function(FACTORED, [x, left, right], [shape, split, by_right, by_left], ("split_shape",))


def _dense_function() -> ir.Function:
    """MatMul."""
    x, matrix = ir.Value(name="X"), ir.Value(name="Matrix")
    return _function(DENSE, [x, matrix], [ir.node("MatMul", [x, matrix])], ())


def _function(
    name: str, inputs: Sequence[ir.Value], nodes: Sequence[ir.Node], attributes: Sequence[str]
) -> ir.Function:
    body = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": OPSET}, name=name)
    declared = [ir.Attr(attribute, ir.AttributeType.INTS, None) for attribute in attributes]
    return ir.Function(DOMAIN, name, graph=body, attributes=declared)
