"""The Hadamard node against the dense matrix in float64."""

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import run_graph
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.hadamard import dense_hadamard, hadamard
from scipy.linalg import block_diag
from scipy.linalg import hadamard as scipy_hadamard

from kurtail_pl.maths.hadamard import block_hadamard_factors, random_hadamard_factors


@pytest.mark.parametrize("size", [2, 8, 12, 60, 96, 172, 576])
@pytest.mark.parametrize("lead", [(2, 3), (1, 0)])
def test_node_multiplies_by_the_dense_matrix(size: int, lead: tuple[int, int]) -> None:
    factors = random_hadamard_factors(size, torch.Generator().manual_seed(size))
    g = GraphBuilder(ir.DataType.FLOAT)
    # As attention gives it: heads of two.
    x = g.input("x", ir.DataType.FLOAT, ["batch", "tokens", size // 2, 2])
    values = np.random.default_rng(0).normal(size=(*lead, size)).astype(np.float32)
    (found,) = run_graph(g, {"y": hadamard(g, x, factors, "mlp_hidden_R5")}, x=values.reshape(*lead, size // 2, 2))
    # Two sums of at most `size` products, each rounded to 24 bits.
    expected = values.astype(np.float64) @ factors.dense().numpy()
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-7 * size)


@pytest.mark.parametrize(("size", "block"), [(48, 16), (1536, 512), (6, 2)])
def test_blocks_are_multiplied_by_the_dense_matrix(size: int, block: int) -> None:
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", "tokens", size])
    values = np.random.default_rng(0).normal(size=(2, 3, size)).astype(np.float32)
    (found,) = run_graph(g, {"y": hadamard(g, x, block_hadamard_factors(size, block), "mlp_hidden_R5")}, x=values)
    dense = block_diag(*[scipy_hadamard(block) / block**0.5] * (size // block))
    np.testing.assert_allclose(found.reshape(values.shape), values.astype(np.float64) @ dense, atol=1e-7 * size)


@pytest.mark.parametrize("size", [2, 60, 256])
def test_heads_are_multiplied_by_the_dense_matrix(size: int) -> None:
    factors = random_hadamard_factors(size, torch.Generator().manual_seed(size))
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", 4, "tokens", size])
    values = np.random.default_rng(0).normal(size=(2, 4, 3, size)).astype(np.float32)
    (found,) = run_graph(g, {"y": dense_hadamard(g, x, factors, "query_key_R3")}, x=values)
    np.testing.assert_allclose(found, values.astype(np.float64) @ factors.dense().numpy(), atol=1e-7 * size)


def test_one_named_node_that_any_runtime_can_inline() -> None:
    factors = random_hadamard_factors(172, torch.Generator().manual_seed(0))
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, [1, "tokens", 172])
    with g.scope("model"), g.scope("mlp"):
        y = hadamard(g, hadamard(g, x, factors, "mlp_hidden_R5"), factors, "mlp_hidden_R5")
    g.output(y, "y", ir.DataType.FLOAT, [1, "tokens", *(len(part) for part in (factors.left, factors.right))])
    proto = ir.to_proto(g.model({}))
    assert [(n.domain, n.op_type, n.name) for n in proto.graph.node] == [
        ("kurtail", "Hadamard", "/model/mlp/mlp_hidden_R5/Hadamard"),
        ("kurtail", "Hadamard", "/model/mlp/mlp_hidden_R5/Hadamard_1"),
    ]
    assert [i.name for i in proto.graph.initializer] == [
        f"kurtail.hadamard.mlp_hidden_R5.{s}" for s in ("left", "right")
    ]
    inlined = onnx.inliner.inline_local_functions(proto)
    assert {n.op_type for n in inlined.graph.node} == {"Constant", "Reshape", "MatMul"}
    values = np.random.default_rng(0).normal(size=(1, 4, 172)).astype(np.float32)
    results = [
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": values})[0] for m in (proto, inlined)
    ]
    np.testing.assert_array_equal(*results)
