"""The MLP block: gate and up projections, SwiGLU, R5, down projection."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kurtail_onnx.graph.activations import Inputs
from kurtail_onnx.graph.hadamard import hadamard
from kurtail_onnx.graph.step import Step


def mlp(step: Step, index: int, x: ir.Value) -> ir.Value:
    """What a layer's MLP adds to the residual stream; x is the normed block input, ``[batch, tokens, hidden]``."""
    names = step.source.architecture
    name = f"{step.source.layer_name(index)}.{names.mlp}"
    with step.g.scope(names.mlp):
        return gated_mlp(step, name, step.read(x, f"{name}.{names.gate}", "gate_up_in"))


def gated_mlp(step: Step, name: str, read: Inputs, some: bool = False) -> ir.Value:
    """``down(silu(gate(x)) * up(x))``.

    Args:
        step: what layers share.
        name: of the MLP, or of one expert, in the whole model.
        read: what gate and up multiply.
        some: of some tokens as one text, not of all.
    """
    g, source, names = step.g, step.source, step.source.architecture
    states: Sequence[ir.Value] = [step.linear(f"{name}.{part}", read) for part in dict.fromkeys((names.gate, names.up))]
    if len(states) == 1:
        states = g.ops("Split", states[0], outputs=2, axis=-1, num_outputs=2)
    gate, up = states
    hidden = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    down = f"{name}.{names.down}"
    rotation = source.rotations.hidden(source.linear(down).in_features)
    if rotation is not None:
        kind = "mlp_hidden" if rotation is source.rotations.mlp_hidden else "dense_hidden"
        hidden = hadamard(g, hidden, rotation, f"{kind}_R5")
    return step.linear(down, step.read(hidden, down, "down_in", some))
