"""A mixture of experts: every expert works on the tokens that the router sends to it, and on no others."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir
from torch import Tensor

from kurtail_onnx.graph.activations import Inputs, IntegerRows
from kurtail_onnx.graph.mlp import gated_mlp
from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import float_weight


def mixture(step: Step, index: int, x: ir.Value) -> ir.Value:
    """What a layer's experts add to the residual stream; x is the normed block input, ``[batch, tokens, hidden]``."""
    g, source, names = step.g, step.source, step.source.architecture
    hidden = source.config.hidden_size
    with g.scope(names.mlp):
        weights, experts = _route(step, index, g.reshape(x, -1, hidden))
        mlps = [f"{source.layer_name(index)}.{name}" for name in names.gated_mlps(source.layers[index])]
        # Quantized once for all experts, unless each has a map, a centre, a clip, a grid or a side of its own.
        states = Inputs(x) if source.experts_differ else step.read(x, f"{mlps[0]}.{names.gate}", "gate_up_in")
        zero = ir.tensor(np.zeros(1, g.dtype.numpy()))
        total = g.op("ConstantOfShape", g.op("Shape", g.reshape(x, -1, hidden)), value=zero)
        for number, name in enumerate(mlps):
            with g.scope(f"experts.{number}"):
                # NonZero gives a row of token numbers and a row of ranks: [2, tokens of this expert].
                place = g.op("Transpose", g.op("NonZero", g.op("Equal", experts, g.index(number))), perm=[1, 0])
                tokens = g.op("Slice", place, g.ints(0), g.ints(1), g.ints(1))
                chosen = _chosen(step, name, states, g.reshape(tokens, -1))
                output = gated_mlp(step, name, chosen, some=True)
                weight = g.op("Unsqueeze", g.op("GatherND", weights, place), g.ints(1))
                weighted = g.op("Mul", g.reshape(output, -1, hidden), weight)
                total = g.op("ScatterND", total, tokens, weighted, reduction="add")
        return g.op("Reshape", total, step.token_shape)


def _route(step: Step, index: int, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Weights and numbers of the experts of each token, ``[tokens, k]`` both, from normed ``[tokens, hidden]``."""
    g, source = step.g, step.source
    name = f"{source.layer_name(index)}.{source.architecture.router}"
    router = source.model.get_submodule(name)
    shape = tuple(cast(Tensor, router.weight).shape)
    with g.scope("router"):
        logits = g.op("MatMul", rows, float_weight(g, source, f"{name}.weight", shape, transposed=True))
        probabilities = g.op("Softmax", g.cast(logits, g.wide), axis=-1)
        weights, experts = g.ops("TopK", probabilities, g.ints(cast(int, router.top_k)), outputs=2)
        if getattr(router, "norm_topk_prob", True):
            weights = g.op("Div", weights, g.op("ReduceSum", weights, g.ints(-1)))
        return g.cast(weights, g.dtype), experts


def _chosen(step: Step, name: str, read: Inputs, tokens: ir.Value) -> Inputs:
    """What an expert's gate and up multiply, some tokens as one text ``[1, tokens, hidden]``.

    Args:
        step: what layers share.
        name: of the expert in the whole model.
        read: the block's input, ``[batch, tokens, hidden]``; already quantized where experts do it alike.
        tokens: numbers of the tokens that the router sends to the expert.
    """
    g, source = step.g, step.source
    states = read.states
    if isinstance(states, IntegerRows):
        codes, scale = (g.op("Gather", part, tokens, axis=0) for part in (states.codes, states.scale))
        return Inputs(IntegerRows(codes, scale, None))
    rows = g.op("Gather", g.reshape(states, -1, source.config.hidden_size), tokens, axis=0)
    rows = g.op("Unsqueeze", rows, g.ints(0))
    if not source.experts_differ:
        return Inputs(rows)
    return step.read(rows, f"{name}.{source.architecture.gate}", "gate_up_in", some=True)
