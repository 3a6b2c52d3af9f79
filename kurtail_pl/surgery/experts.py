"""Experts of a mixture as modules of their own, so that folds, rotations and quantizers treat each as a gated MLP.

transformers keeps all experts of a layer in two three-dimensional parameters; here each has linears of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kurtail_pl.surgery.architecture import Architecture


class Gated(nn.Module):
    """``act(gate) * up``."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act_fn = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``[tokens, width]``, all three."""
        return cast(Tensor, self.act_fn(gate) * up)


class Clamped(nn.Module):
    """``gate sigmoid(alpha gate) (up + 1)`` of a gate up to a limit and of an up within it."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``[tokens, width]``, all three."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


class Expert(nn.Module):
    """One gated MLP, ``down(gated(gate(x), up(x)))``, of width `width` in a stream of `hidden`."""

    def __init__(self, hidden: int, width: int, bias: bool, gated: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> ``[tokens, hidden]``."""
        return cast(Tensor, self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x))))


class Experts(nn.ModuleList):
    """Stands in for transformers' fused experts, with the same call.

    Args:
        fused: transformers' module, with `gate_up_proj` ``[experts, 2 width, hidden]`` and `act_fn`, or, interleaved,
            ``[experts, hidden, 2 width]``, and with `alpha` and `limit`.
        interleaved: which of these it is.
    """

    def __init__(self, fused: nn.Module, interleaved: bool) -> None:
        count, both, hidden = cast(Tensor, fused.gate_up_proj).shape
        if interleaved:
            both, hidden = hidden, both
            gated: nn.Module = Clamped(cast(float, fused.alpha), cast(float, fused.limit))
        else:
            gated = Gated(cast(nn.Module, fused.act_fn))
        super().__init__([Expert(hidden, both // 2, interleaved, gated) for _ in range(count)])

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
    if name is not None and architecture.has_experts(layer):
        with torch.device("meta"):
            layer.set_submodule(name, Experts(layer.get_submodule(name), architecture.interleaved))


def written(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What an MLP block writes; some families' give what their routers found beside it."""
    return output if isinstance(output, Tensor) else output[0]


def routed(layer: nn.Module, architecture: Architecture, x: Tensor) -> Tensor:
    """The experts that a layer's router sends ``[tokens, hidden]`` to, ``[tokens, k]``."""
    router, bias = architecture.router, architecture.choosing_bias
    assert router is not None
    beside = () if bias is None or bias.startswith(f"{router}.") else (layer.get_buffer(bias),)
    _, _, index = cast(Any, layer.get_submodule(router))(x, *beside)
    return cast(Tensor, index)
