"""How the error of a uniform quantizer grows when its step is not the best one; which token maxima shrink.

The sensitivity is Chmiel et al.'s ("Robust Quantization: One Model to Rule Them All", arXiv 2002.07686, Def. 1), which
KurTail (arXiv 2503.01483) takes over for Fig. 1 and Theorem 2.2; the success rate is that of KurTail's Table 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GRID_POINTS, REFINEMENTS, REFINED_POINTS = 64, 3, 17
"""Of the search for the best step: steps of the first grid; further grids, each between two steps of the one before."""


class Sensitivity(NamedTuple):
    """Best step and its error, both ``[]``, and the growth of the error at multiples of it, ``[k]``; float64."""

    step: Tensor
    error: Tensor
    growth: Tensor


def quantization_error(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Mean squared error ``MSE(X, step) = E[(X - Q(X))^2]`` of the symmetric uniform quantizer at given steps.

    ``Q(x) = step * clamp(round(x / step), -2^(bits-1), 2^(bits-1) - 1)``: the grid of our symmetric quantizers.

    Args:
        values: ``[...]``, pooled.
        steps: ``[k]``, positive.
        bits: of the codes.

    Returns:
        ``[k]``, float64, in the square of the values' unit.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    errors = [(values - step * (values / step).round_().clamp_(low, high)).square_() for step in steps.tolist()]
    return torch.stack([error.mean(dtype=torch.float64) for error in errors])


def best_step(values: Tensor, bits: int) -> Tensor:
    """Step of the smallest error, by a search on ever finer geometric grids, to about 1e-4 of itself.

    The first grid goes from where all but the smallest values are clipped to where none is; a heavy-tailed
    distribution has several local minima between, so that no descent is used.

    Args:
        values: ``[...]``, pooled, not all zero.
        bits: of the codes.

    Returns:
        ``[]``, float64, in the values' unit.
    """
    low = values.double().square().mean().sqrt().item() / 2 ** (bits + 1)
    high = values.abs().max().item() * 1.1 / ((1 << (bits - 1)) - 1)
    steps = _geometric(low, high, GRID_POINTS)
    for refinement in range(REFINEMENTS + 1):
        best = int(quantization_error(values, steps, bits).argmin())
        if refinement < REFINEMENTS:
            low, high = steps[max(best - 1, 0)].item(), steps[min(best + 1, len(steps) - 1)].item()
            steps = _geometric(low, high, REFINED_POINTS)
    return steps[best]


def _geometric(low: float, high: float, points: int) -> Tensor:
    exponents = torch.linspace(0, 1, points, dtype=torch.float64)
    return low * (high / low) ** exponents


def sensitivity(values: Tensor, fractions: Tensor, bits: int) -> Sensitivity:
    """Quantization sensitivity ``|MSE(X, a s) - MSE(X, s)|`` at fractions a of the best step s (KurTail, Fig. 1).

    In the papers' notation it is ``Gamma(X, eps)`` with ``eps = |a - 1| s``. Theorem 2.2 says that it is lower for a
    uniform than for a normal X. At equal variance that is so for steps well above the best one (from a = 1.2 at 4
    bits); nearer to it and below it a uniform X, all of whose mass would be clipped at once, is the more sensitive.

    Args:
        values: ``[...]``, pooled, not all zero.
        fractions: a, ``[k]``.
        bits: of the codes.
    """
    step = best_step(values, bits)
    error = quantization_error(values, step[None], bits)[0]
    return Sensitivity(step, error, (quantization_error(values, fractions.double() * step, bits) - error).abs())


def reduces_maximum(first: Tensor, second: Tensor) -> Tensor:
    """Whether each token's largest magnitude is smaller in the first than in the second (KurTail, Table 8).

    Args:
        first: ``[..., tokens, channels]``.
        second: the same tokens after another rotation, ``[..., tokens, channels]``.

    Returns:
        ``[..., tokens]``, bool; False where both are equal.

    >>> reduces_maximum(torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([[4.0, 0.0], [2.0, 0.0]])).tolist()
    [True, False]
    """
    return first.abs().amax(-1) < second.abs().amax(-1)
