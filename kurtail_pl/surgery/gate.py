"""The exactness gate: a fold must leave the model's output as it was."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from kurtail_pl.errors import GateError

FLOAT64_TOLERANCE = 1e-8
FLOAT32_TOLERANCE = 1e-4


def relative_change(reference: Tensor, value: Tensor) -> float:
    """``max |value - reference| / max |reference|``."""
    reference = reference.double()
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def check(fold: str, reference: Tensor, value: Tensor, tolerance: float) -> float:
    """Pass, returning the relative change, or fail loudly.

    Raises:
        GateError: naming the fold, the change and the tolerance; also when the value is not finite.
    """
    change = relative_change(reference, value)
    if not change < tolerance:
        raise GateError(
            f"{fold} changed the output by {change:.1e} relative, more than {tolerance:.0e}; nothing was kept. "
            "The model does not match its architecture record, or a rotation is not orthogonal"
        )
    return change


def use_exact_norm(module: nn.Module, name: str, eps: float) -> None:
    """Replace a norm, in place, by torch's own with the same weight, which computes in its input's dtype.

    transformers' RMSNorm computes in float32 whatever it is given, which would hide what a float64 gate looks for.
    """
    weight = cast(Tensor, module.get_submodule(name).weight)
    norm = nn.RMSNorm(weight.shape[0], eps=eps, device="meta")
    norm.weight = nn.Parameter(weight.data, requires_grad=False)
    module.set_submodule(name, norm)
