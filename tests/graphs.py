"""Graphs of a few nodes, run by ONNX Runtime."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from kurtail_onnx.graph.builder import GraphBuilder
from numpy.typing import NDArray

Array = NDArray[Any]


def run_graph(g: GraphBuilder, outputs: dict[str, ir.Value], **feeds: Array) -> list[Array]:
    """Values of a graph under construction, whose inputs are declared; weights inside the file."""
    for name, value in outputs.items():
        value.name = name
        g.graph.outputs.append(value)
    proto = ir.to_proto(g.model({}))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def random_array(*shape: int, seed: int = 0) -> Array:
    """Normal values with an outlier channel; the first row is all zeros, the second has one sign."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    values[..., 3] *= 20
    rows = values.reshape(-1, shape[-1])
    rows[0] = 0
    rows[1] = np.abs(rows[1]) + 0.1
    return values
