"""RMSNorm."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
from torch import Tensor

from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import float_weight


def rms_norm(step: Step, name: str, x: ir.Value) -> ir.Value:
    """Norm the last dimension of x by a norm of the model, by its name in the whole model; sums are float32."""
    module = step.source.model.get_submodule(name)
    width = cast(Tensor, module.weight).shape[0]
    with step.g.scope(name.rsplit(".", 1)[-1]):
        weight = float_weight(step.g, step.source, f"{name}.weight", (width,))
        eps = cast(float, module.variance_epsilon)
        return step.g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)
