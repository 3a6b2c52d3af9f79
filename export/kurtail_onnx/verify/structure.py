"""The file itself: a valid model, made of the operators that were meant to be in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from kurtail_onnx.describe import MODEL
from kurtail_pl.errors import CheckFailed, reason

ALLOWED = {
    "": {
        *("Add", "And", "Cast", "Div", "Equal", "Greater", "LessOrEqual", "Mul", "Neg", "Or", "Round", "Sub"),
        *("Abs", "Clip", "Max", "Min", "ReduceMax", "ReduceMin", "TopK", "Where"),
        *("Concat", "Gather", "Range", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
        *("Attention", "MatMul", "MatMulInteger", "RMSNormalization", "RotaryEmbedding", "Sigmoid"),
        # In double.
        *("ReduceMean", "Sqrt"),
        # Of a prefix.
        "Expand",
        *("DequantizeLinear", "QuantizeLinear"),
        # Of a mixture of experts.
        *("ConstantOfShape", "GatherND", "NonZero", "ReduceSum", "ScatterND", "Softmax"),
    },
    "kurtail": {"DenseHadamard", "Hadamard"},
    "com.microsoft": {"MatMulNBits"},
}
"""Domain -> operators that exports are made of; each has a kernel on the CPU and on CUDA."""
FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


def check_structure(folder: Path) -> dict[str, int]:
    """Count the operators of an export.

    Raises:
        CheckFailed: when ONNX's checker refuses the file, an operator is unknown, or a 4-bit tensor is anywhere but
            between quantization and dequantization.
    """
    try:
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"the ONNX checker refuses {MODEL}: {reason(error)}") from error
    graph = ir.load(folder / MODEL).graph
    unknown = sorted({f"{n.domain}::{n.op_type}" for n in graph if n.op_type not in ALLOWED.get(n.domain, set())})
    if unknown:
        raise CheckFailed(f"{MODEL} holds operators that exports are not made of: {', '.join(unknown)}")
    for value in graph.initializers.values():
        users = {node.op_type for node, _ in value.uses()}
        if value.dtype in FOUR_BITS and not users <= {"QuantizeLinear", "DequantizeLinear", "Cast"}:
            raise CheckFailed(f"the 4-bit initializer {value.name} is read by {sorted(users)}; no runtime moves 4 bits")
    return dict(sorted(Counter(node.op_type for node in graph).items()))
