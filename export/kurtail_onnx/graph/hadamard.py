"""`kurtail::Hadamard`: an online rotation as one node, whose function body any runtime can inline.

``Hadamard(X, Left, Right)`` reshapes the last dimension to ``[a, b]``, computes ``Left X Right`` and reshapes back;
``DenseHadamard(X, Matrix)`` is one product, faster where the matrix is small. Both are model-local functions: nothing
needs to be installed, a viewer shows one node for each rotation, and a library of custom operators can claim the node
later. Random signs are inside the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kurtail_onnx.graph.builder import OPSET, GraphBuilder
from kurtail_pl.maths.hadamard import HadamardFactors

DOMAIN, FACTORED, DENSE = "kurtail", "Hadamard", "DenseHadamard"
DENSE_SIZE = 128
"""Up to this order one dense product beats two products of small blocks and two reshapes."""


def hadamard(g: GraphBuilder, x: ir.Value, factors: HadamardFactors, name: str, rank: int) -> ir.Value:
    """Rotate the last dimension of x by ``kron(left, right)``.

    Args:
        g: the graph.
        x: ``[..., n]``.
        factors: of order n; the matrices are initializers shared by all nodes of one `name`.
        name: our name and the paper's number, such as ``mlp_hidden_R5``.
        rank: dimensions of x.
    """
    dtype, stored = g.dtype.numpy(), f"kurtail.hadamard.{name}"
    if factors.size <= DENSE_SIZE:
        matrix = g.constant(factors.dense().numpy().astype(dtype), f"{stored}.dense")
        return g.call(_dense_function(), x, matrix, name=f"{name}/Hadamard")
    rows, columns = factors.left.shape[0], factors.right.shape[0]
    # hadamard_transform computes left^T X right: the transpose is stored.
    left = g.constant(factors.left.mT.numpy().astype(dtype), f"{stored}.left")
    right = g.constant(factors.right.numpy().astype(dtype), f"{stored}.right")
    kept = [0] * (rank - 1)
    return g.call(
        _factored_function(), x, left, right, name=f"{name}/Hadamard",
        split_shape=[*kept, rows, columns], merge_shape=[*kept, factors.size],
    )  # fmt: skip


def _factored_function() -> ir.Function:
    """Reshape, MatMul, MatMul, Reshape; a zero in a shape keeps that dimension."""
    x, left, right = (ir.Value(name=name) for name in ("X", "Left", "Right"))
    shapes = [
        ir.node("Constant", [], {"value_ints": ir.RefAttr("value_ints", attribute, ir.AttributeType.INTS)})
        for attribute in ("split_shape", "merge_shape")
    ]
    split = ir.node("Reshape", [x, *shapes[0].outputs])
    by_right = ir.node("MatMul", [*split.outputs, right])
    by_left = ir.node("MatMul", [left, *by_right.outputs])
    merge = ir.node("Reshape", [*by_left.outputs, *shapes[1].outputs])
    nodes = [*shapes, split, by_right, by_left, merge]
    return _function(FACTORED, [x, left, right], nodes, ("split_shape", "merge_shape"))


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
