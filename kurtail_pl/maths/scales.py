"""Scales of channels, at no cost at run time, with which a quantizer errs less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Of the mean: dead channels and unread ones get no scale beyond this."""
SPREAD = 2.0
"""Power of the norm that the error behind a Hadamard goes with: it spreads a row's sum of squares evenly."""


def range_power(width: int) -> float:
    """Power of the norm that the error of a row which nothing spreads goes with: ``2 ln n``.

    Its step is the row's range. Of n normal values, each with a deviation of its own, the largest is channel i's in a
    share of rows that grows as ``sigma_i^(t^2)`` near equal deviations, where ``t^2 = 2 ln n`` is the square of the
    largest value that n give; so does the part of channel i in their p-norm with ``p = 2 ln n``.
    """
    return max(SPREAD, 2 * math.log(width))


def balanced_scale(energy: Tensor, weight: Tensor, power: float = SPREAD) -> Tensor:
    """Scale s of the channels of x with which ``Q(s x) (W / s)^T`` has the least error.

    The quantizer's step goes with the p-norm of what the channels hold, and its error is alike in all of them: the
    output's squared error goes with ``sum((s^2 energy)^(p/2))^(2/p) sum(weight / s^2)``. Where the derivative by each
    ``log s`` is zero, ``s^(p + 2) = weight / energy^(p/2)``.

    Behind a Hadamard H, as in ``Q(s x H) (H^T W / s)^T``, the step goes with the sum of squares, p is 2, and this is
    the minimum by the inequality of Cauchy and Schwarz: ``s^4 = weight / energy``. Where nothing spreads a row, p is
    large (`range_power`), and the scale is nearly ``1 / sqrt(energy)``: all channels fill the range.

    Args:
        energy: mean square of each channel of x, ``[..., n]``.
        weight: sum of squares of what multiplies it in W, ``[..., n]``.
        power: p, at least 2.

    Returns:
        Scales ``[..., n]``, their geometric mean 1; where x, or W, is zero, as if all its channels were equal.
    """
    logarithm = (_log(weight) - power / 2 * _log(energy)) / (power + 2)
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


def absmax_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scale s of the channels of x with which ``s x`` and ``W / s`` share what both span.

    ``s = weights^(1 - alpha) / inputs^alpha``: all channels of x span as much where alpha is 1, all of W where it is 0
    (SmoothQuant, arXiv 2211.10438, equation 4, whose s is the inverse).

    Args:
        inputs: largest magnitude of each channel of x, ``[..., n]``.
        weights: largest magnitude of what multiplies it in W, ``[..., n]``.
        alpha: from 0 to 1.

    Returns:
        Scales ``[..., n]``, their geometric mean 1; where x, or W, is zero, as if all its channels were equal.
    """
    logarithm = ((1 - alpha) * _log(weights.square()) - alpha * _log(inputs.square())) / 2
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


def _log(squares: Tensor) -> Tensor:
    floor = SMALLEST * squares.mean(-1, keepdim=True)
    return torch.maximum(squares, floor.clamp(min=torch.finfo(squares.dtype).tiny)).log()
