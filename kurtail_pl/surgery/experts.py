"""Experts of a mixture as modules of their own, so that folds, rotations and quantizers treat each as a gated MLP.

transformers keeps all experts of a layer in two three-dimensional parameters; checkpoints on the hub keep a tensor for
each expert and projection. Here the modules are as on the hub, and both kinds of checkpoint are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from kurtail_pl.surgery.architecture import Architecture


class Expert(nn.Module):
    """One gated MLP, ``down(act(gate(x)) * up(x))``, of width `width` in a stream of `hidden`."""

    def __init__(self, hidden: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> ``[tokens, hidden]``."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.ModuleList):
    """Stands in for transformers' fused experts, with the same call.

    Args:
        fused: transformers' module, with `gate_up_proj` ``[experts, 2 width, hidden]`` and `act_fn`.
    """

    def __init__(self, fused: nn.Module) -> None:
        count, both, hidden = cast(Tensor, fused.gate_up_proj).shape
        super().__init__([Expert(hidden, both // 2, cast(nn.Module, fused.act_fn)) for _ in range(count)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: the experts that each token goes to, ``[tokens, k]``.
            top_k_weights: their weights, ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, rank = (top_k_index == number).nonzero(as_tuple=True)
            if len(token):
                output = expert(hidden_states[token]) * top_k_weights[token, rank, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


def separate_experts(layer: nn.Module, architecture: Architecture) -> None:
    """Put `Experts` in the place of a decoder layer's fused experts; a layer without any is left as it is."""
    name = architecture.experts
    if name is not None and name in dict(layer.named_modules()):
        with torch.device("meta"):
            layer.set_submodule(name, Experts(layer.get_submodule(name)))


def module_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A decoder layer's tensors by the names of our modules, from a checkpoint's.

    Args:
        state: tensors by their names in the checkpoint, relative to the layer; experts apart or fused.
        architecture: record of the family.
    """
    named = {_module_name(name, architecture): tensor for name, tensor in state.items()}
    gate_up, down = (named.pop(f"{architecture.experts}.{name}", None) for name in ("gate_up_proj", "down_proj"))
    if gate_up is not None and down is not None:
        for number, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            parts = (architecture.gate, architecture.up, architecture.down)
            for part, weight in zip(parts, (*both.chunk(2), last), strict=True):
                named[f"{architecture.experts}.{number}.{part}.weight"] = weight
    return named


def _module_name(name: str, architecture: Architecture) -> str:
    for ours, theirs in architecture.on_disk:
        name = name.replace(theirs, ours)
    return name


def routed(router: nn.Module, x: Tensor) -> Tensor:
    """The experts that a router sends ``[tokens, hidden]`` to, ``[tokens, k]``."""
    _, _, index = cast(Any, router)(x)
    return cast(Tensor, index)
