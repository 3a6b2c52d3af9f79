"""RMSNorm."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
from torch import Tensor

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import float_weight


def rms_norm(step: Step, name: str, x: ir.Value) -> ir.Value:
    """Norm the last dimension of x by a norm of the model, named as in all of it; sums are float32 or wider."""
    module = step.source.model.get_submodule(name)
    width = cast(Tensor, module.weight).shape[0]
    with step.g.scope(name.rsplit(".", 1)[-1]):
        weight = float_weight(step.g, step.source, f"{name}.weight", (width,))
        eps = cast(float, module.variance_epsilon)
        if step.g.double:
            return _in_double(step.g, x, weight, eps)
        return step.g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def _in_double(g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """Written out: an attribute of a node, such as epsilon, is float32."""
    power = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1))
    root = g.op("Sqrt", g.op("Add", power, g.scalar(eps)))
    return g.op("Mul", g.op("Div", x, root), weight)
