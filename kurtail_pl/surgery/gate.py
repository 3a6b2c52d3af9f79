"""The exactness gate: a fold must leave the model's output as it was."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.errors import GateError, NotFinite
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.surgery.architecture import Architecture

FLOAT64_TOLERANCE = 1e-8
FLOAT32_TOLERANCE = 1e-4


class LargestChange:
    """``max |value - reference| / max |reference|`` of tensors that come in parts."""

    def __init__(self) -> None:
        self._change, self._reference = torch.zeros(()), torch.zeros(())

    def update(self, reference: Tensor, value: Tensor) -> None:
        """Take the next part into account."""
        reference = reference.double()
        # torch.maximum keeps a nan, which must not pass the gate.
        self._change = torch.maximum(self._change, (value.double() - reference).abs().max().cpu())
        self._reference = torch.maximum(self._reference, reference.abs().max().cpu())

    @property
    def relative(self) -> float:
        """The change so far."""
        return (self._change / self._reference).item()


def check(fold: str, reference: Tensor, value: Tensor, tolerance: float) -> float:
    """Pass, returning the relative change of a tensor, or fail loudly, as `require`.

    Raises:
        GateError: as `require`.
        NotFinite: when the original's output is not finite: no fold is to blame.
    """
    if not is_finite(reference):
        raise NotFinite(
            f"the original model's output is nan or infinite before {fold}; its values are too large even for float64: "
            "use another copy of the model"
        )
    change = LargestChange()
    change.update(reference, value)
    return require(fold, change.relative, tolerance)


def require(fold: str, change: float, tolerance: float) -> float:
    """Pass a change under the tolerance, returning it, or fail loudly.

    Raises:
        GateError: naming the fold, the change and the tolerance; also when the change is not a number.
    """
    if not change < tolerance:
        raise GateError(
            f"{fold} changed the output by {change:.1e} relative, more than {tolerance:.0e}; nothing was kept. "
            "The model does not match its architecture record, or a rotation is not orthogonal"
        )
    return change


class ExactNorm(nn.Module):
    """An RMSNorm that computes in its input's dtype.

    Args:
        weight: ``[n]``, shared.
        eps: added to the mean square.
        offset: added to the weight.
    """

    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]`` -> the same."""
        return F.rms_norm(x, self.weight.shape, self.weight + self.offset, self.eps)


def use_exact_norm(module: nn.Module, name: str, eps: float, offset: float = 0.0) -> None:
    """Replace a norm, in place, by one with the same weight that computes in its input's dtype.

    transformers' RMSNorm computes in float32 whatever it is given, which would hide what a float64 gate looks for.
    """
    weight = cast(Tensor, module.get_submodule(name).weight)
    module.set_submodule(name, ExactNorm(weight, eps, offset))


class ExactRouter(nn.Module):
    """transformers' top-k router, computing in its input's dtype instead of float32.

    Args:
        router: the module to stand in for; its weight and its bias, if any, are shared. Families that do not always
            normalise the chosen weights say so in `norm_topk_prob`.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, router.weight)
        self.bias = cast(nn.Parameter | None, getattr(router, "bias", None))
        self.top_k = cast(int, router.top_k)
        self.norm_topk_prob = bool(getattr(router, "norm_topk_prob", True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[tokens, hidden]`` -> logits ``[tokens, experts]``, weights and experts, both ``[tokens, k]``."""
        logits = F.linear(x, self.weight, self.bias)
        weights, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, index


class ExactSigmoidRouter(nn.Module):
    """transformers' router by sigmoids within groups, computing in its input's dtype instead of float32.

    Args:
        router: the module to stand in for; its weight is shared, and its bias, which only chooses, if it has one.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, router.weight)
        self.register_buffer("e_score_correction_bias", getattr(router, "e_score_correction_bias", None))
        self.top_k, self.groups, self.best_groups = (
            cast(int, getattr(router, name, 1)) for name in ("top_k", "num_group", "topk_group")
        )
        self.norm_topk_prob = bool(getattr(router, "norm_topk_prob", True))
        self.routed_scaling_factor = cast(float, getattr(router, "routed_scaling_factor", 1.0))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., hidden]`` -> logits ``[tokens, experts]``, weights and experts, both ``[tokens, k]``.

        The bias is given where the router has none of its own.
        """
        bias = bias if bias is not None else cast(Tensor, self.e_score_correction_bias)
        logits = F.linear(x.flatten(0, -2), self.weight)
        scores = logits.sigmoid()
        grouped = (scores + bias).view(len(scores), self.groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.best_groups, dim=-1).indices
        seen = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        index = grouped.masked_fill(~seen.unsqueeze(-1), -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, index)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.norm_topk_prob else weights
        return logits, weights * self.routed_scaling_factor, index


EXACT_ROUTERS: dict[str, type[nn.Module]] = {"softmax": ExactRouter, "sigmoid": ExactSigmoidRouter}
"""By how a record says that they weigh experts."""


def use_exact_layer(layer: nn.Module, architecture: Architecture, eps: float) -> None:
    """Make a decoder layer's norms and router compute in their input's dtype."""
    for norm in architecture.norms:
        use_exact_norm(layer, norm, eps, architecture.norm_offset)
    router = architecture.router_of(layer)
    if router is not None:
        layer.set_submodule(router, EXACT_ROUTERS[architecture.routing](layer.get_submodule(router)))
