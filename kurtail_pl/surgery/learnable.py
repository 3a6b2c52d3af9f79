"""A whole model whose weights are functions of R1 and R2, so that these learn through its output (SpinQuant)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from kurtail_pl.maths.hadamard import hadamard_transform
from kurtail_pl.methods import Format
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.equip import equip_layer, layers_of
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import Rotations

Turn = Callable[[Tensor], Tensor]
"""From a weight ``[out, in]`` to the one that the rotated model has in its place."""


def make_learnable(model: PreTrainedModel, scheme: Scheme, online: Rotations, residual: Tensor, value: Tensor) -> None:
    """Change a plain float32 model, in place, into the rotated and fake-quantized one.

    Its own weights, norms folded into them, are kept and do not learn. Each forward computes the rotated weights anew,
    so that gradients of the output reach R1 and R2 (SpinQuant, arXiv 2405.16406, §3.2). Embedding and head are left as
    they are and the hidden states rotated instead: that is the same, and much smaller than the vocabulary.

    Args:
        model: with its weights.
        scheme: what the forward quantizes; gradients pass straight through. Weights are rounded to nearest.
        online: R3 to R5, which do not learn.
        residual: R1 ``[hidden, hidden]``.
        value: R2 ``[layers, head_dim, head_dim]`` or ``[layers, kv_heads, head_dim, head_dim]``.
    """
    architecture = architecture_of(model.config)
    model.requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    _turn_ends(model, architecture, residual)
    for index, layer in enumerate(layers_of(model, architecture)):
        _turn_layer(layer.double(), architecture, scheme, online, residual, value, index)


def _turn_ends(model: PreTrainedModel, architecture: Architecture, residual: Tensor) -> None:
    head = cast(nn.Linear, model.get_submodule(architecture.head))
    # A tied head is untied: the final norm goes into it alone.
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    folding.fold_norm(model.get_submodule(architecture.final_norm), [head])
    embedding = model.get_submodule(architecture.embedding)
    embedding.register_forward_hook(lambda module, arguments, output: output @ residual)
    head.register_forward_pre_hook(lambda module, arguments: (arguments[0] @ residual.T,))


def _turn_layer(
    layer: nn.Module,
    architecture: Architecture,
    scheme: Scheme,
    online: Rotations,
    residual: Tensor,
    value: Tensor,
    index: int,
) -> None:
    folding.fold_layer_norms(layer, architecture)
    folding.flip_hidden(layer, architecture, online)
    writers = architecture.mlp_writers(layer)
    for name in writers:
        linear = folding.linear_of(layer, name)
        factors = online.hidden(linear.in_features)
        if factors is not None:
            folding.absorb_online(linear, factors)
    equip_layer(layer.float(), architecture, scheme, online, value.shape[-1])

    def per_head() -> Tensor:
        return folding.per_kv_head(layer, architecture, value[index])

    def read(weight: Tensor) -> Tensor:
        return weight @ residual

    def write(weight: Tensor) -> Tensor:
        return residual.T @ weight

    def turn_values(weight: Tensor) -> Tensor:
        return folding.turn_values(weight, per_head())

    def turn_output(weight: Tensor) -> Tensor:
        turned = write(folding.turn_heads(weight, per_head()))
        # R4 comes after R2, which learns: its inverse cannot be absorbed beforehand.
        return turned if online.attention_output is None else hadamard_transform(turned, online.attention_output)

    turns: dict[str, list[Turn]] = {name: [read] for name in folding.residual_readers(layer, architecture)}
    turns |= {architecture.output: [turn_output]} | {name: [write] for name in writers}
    turns[architecture.value].append(turn_values)
    for name, steps in turns.items():
        rounded = [_rounded_to(scheme.weights)] if scheme.weights and name != architecture.router else []
        _compute(layer.get_submodule(name), "weight", [*steps, *rounded])
    for name in (architecture.output, *writers):
        _compute_bias(layer.get_submodule(name), write)
    _compute_bias(layer.get_submodule(architecture.value), turn_values)


class _Turned(nn.Module):
    """A weight computed from the one that is kept; the rotations it closes over belong to someone else."""

    def __init__(self, steps: Iterable[Turn]) -> None:
        super().__init__()
        self._steps = tuple(steps)

    def forward(self, weight: Tensor) -> Tensor:
        for step in self._steps:
            weight = step(weight)
        return weight


def _compute(module: nn.Module, name: str, steps: Iterable[Turn]) -> None:
    # unsafe: the check that shapes stay would compute every weight once.
    parametrize.register_parametrization(module, name, _Turned(steps), unsafe=True)


def _compute_bias(linear: nn.Module, turn: Turn) -> None:
    """A bias is turned as a weight of one column is."""
    if linear.bias is not None:
        _compute(linear, "bias", [lambda bias: turn(bias.unsqueeze(1)).squeeze(1)])


def _rounded_to(weights: Format) -> Turn:
    """Round a weight to nearest; gradients pass straight through."""

    def rounded(weight: Tensor) -> Tensor:
        with torch.no_grad():
            error: Tensor = weights.values(weights.nearest(weight)).to(weight.dtype) - weight
        return weight + error

    return rounded
