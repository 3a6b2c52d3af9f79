"""`kurtail::Hadamard`: an online rotation as one node, whose function body any runtime can inline.

``Hadamard(X, Left, Right)`` reshapes the last dimension to ``[a, b]``, computes ``Left X Right`` and reshapes back. It
is a model-local function: nothing needs to be installed, a viewer shows one node for each rotation, and a library of
custom operators can claim the node later. Random signs are inside the factors.
"""

from __future__ import annotations

import onnx_ir as ir

from kurtail_onnx.graph.builder import OPSET, GraphBuilder
from kurtail_pl.maths.hadamard import HadamardFactors

DOMAIN, NAME = "kurtail", "Hadamard"


def hadamard(g: GraphBuilder, x: ir.Value, factors: HadamardFactors, name: str, rank: int) -> ir.Value:
    """Rotate the last dimension of x by ``kron(left, right)``.

    Args:
        g: the graph.
        x: ``[..., n]``.
        factors: of order n; the two matrices are initializers shared by all nodes of one `name`.
        name: our name and the paper's number, such as ``mlp_hidden_R5``.
        rank: dimensions of x.
    """
    rows, columns = factors.left.shape[0], factors.right.shape[0]
    dtype = g.dtype.numpy()
    # hadamard_transform computes left^T X right: the transpose is stored.
    left = g.constant(factors.left.mT.numpy().astype(dtype), f"kurtail.hadamard.{name}.left")
    right = g.constant(factors.right.numpy().astype(dtype), f"kurtail.hadamard.{name}.right")
    kept = [0] * (rank - 1)
    return g.call(
        hadamard_function(), x, left, right, name=f"{name}/{NAME}",
        split_shape=[*kept, rows, columns], merge_shape=[*kept, factors.size],
    )  # fmt: skip


def hadamard_function() -> ir.Function:
    """The body: Reshape, MatMul, MatMul, Reshape; a zero in a shape keeps that dimension."""
    x, left, right = (ir.Value(name=name) for name in ("X", "Left", "Right"))
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, output: str, **attributes: ir.Attr) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=output)]))
        return nodes[-1].outputs[0]

    def shape(attribute: str) -> ir.Value:
        reference = ir.RefAttr("value_ints", attribute, ir.AttributeType.INTS)
        return op("Constant", output=attribute.replace("_shape", "_to"), value_ints=reference)

    split = op("Reshape", x, shape("split_shape"), output="blocks")
    rotated = op("MatMul", left, op("MatMul", split, right, output="right_rotated"), output="rotated")
    merged = op("Reshape", rotated, shape("merge_shape"), output="Y")
    body = ir.Graph([x, left, right], [merged], nodes=nodes, opset_imports={"": OPSET}, name=NAME)
    attributes = [ir.Attr(name, ir.AttributeType.INTS, None) for name in ("split_shape", "merge_shape")]
    return ir.Function(DOMAIN, NAME, graph=body, attributes=attributes)
