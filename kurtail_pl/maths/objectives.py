"""What R1 can be learned by: losses of one site's rotated rows that are small where 4-bit grids fit them well."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kurtail_pl.maths.kurtosis import UNIFORM_KURTOSIS, Mean, kurtosis
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize


def pooled_kurtosis(rows: Tensor, mean: Mean, target: float = UNIFORM_KURTOSIS) -> Tensor:
    """Distance of the kurtosis of all rows together from a target (KurTail, arXiv 2503.01483, Eq. 4: 1.8)."""
    return (kurtosis(rows, mean) - target).abs()


def token_kurtosis(rows: Tensor, mean: Mean, target: float = UNIFORM_KURTOSIS) -> Tensor:
    """Distance of each row's own kurtosis from a target: a per-token grid has to fit that row alone."""
    return mean((kurtosis(rows) - target).abs())


def group_kurtosis(rows: Tensor, mean: Mean, target: float = UNIFORM_KURTOSIS) -> Tensor:
    """Distance of the mean of the rows' kurtosis from a target.

    Rows of different sizes weigh alike, as each has a scale of its own, and one may lie above the target and another
    below.
    """
    return (mean(kurtosis(rows)) - target).abs()


def square_range(rows: Tensor, mean: Mean) -> Tensor:
    """Square of each row's range, which a per-token grid spans: its error is proportional to it."""
    return mean((rows.amax(-1) - rows.amin(-1)).square())


def whip(rows: Tensor, mean: Mean) -> Tensor:
    """``sum exp(-|x|)`` of each row (DartQuant, arXiv 2511.04063): small values are pushed away from zero."""
    return mean(torch.exp(-rows.abs()).sum(-1))


def wasserstein(rows: Tensor, mean: Mean) -> Tensor:
    """Square Wasserstein distance, of order 2, of each row's values from uniform ones of the same mean and variance.

    In one dimension the best transport keeps the order: the k-th smallest of n values goes to the uniform
    distribution's ``(k - 1/2) / n`` quantile (Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters", §2).
    """
    n = rows.shape[-1]
    places = (2 * torch.arange(n, dtype=rows.dtype, device=rows.device) + 1) / n - 1
    variance, centre = torch.var_mean(rows, -1, correction=0, keepdim=True)
    uniform = centre + (3 * variance).sqrt() * places
    return mean((rows.sort(-1).values - uniform).square().mean(-1))


def rounding_error(rows: Tensor, mean: Mean, quantizer: Quantizer) -> Tensor:
    """Mean square error of a quantizer over the mean square of the rows: what all objectives stand for.

    No objective itself: the derivative of rounding says nothing.
    """
    return mean((rows - fake_quantize(rows, quantizer)).square()) / mean(rows.square())


KURTOSES: dict[str, Callable[..., Tensor]] = {
    "kurtosis": pooled_kurtosis,
    "token_kurtosis": token_kurtosis,
    "group_kurtosis": group_kurtosis,
}
"""Those that have a target."""
OBJECTIVES: dict[str, Callable[[Tensor, Mean], Tensor]] = {
    **KURTOSES,
    "range": square_range,
    "whip": whip,
    "wasserstein": wasserstein,
}
"""By the names they have in recipes.

Each takes rows ``[rows, n]``, or groups of them ``[rows, groups, n]``, and a mean over them, which knows how much each
row counts, and gives a scalar.
"""


def objective_of(kind: str, target: float) -> Callable[[Tensor, Mean], Tensor]:
    """An objective by its name, with its target where it has one."""
    return partial(KURTOSES[kind], target=target) if kind in KURTOSES else OBJECTIVES[kind]
