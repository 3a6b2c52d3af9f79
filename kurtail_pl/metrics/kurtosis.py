"""Kurtosis as a torchmetrics class: batches, and processes, merge by their moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kurtail_pl.maths.kurtosis import Moments, kurtosis_of, merge_moments, moments


def _merge_all(stacked: Tensor) -> Tensor:
    """Merge the moments of several processes: ``[processes, 5, sites]`` -> ``[5, sites]``."""
    merged = Moments(*stacked[0])
    for other in stacked[1:]:
        merged = merge_moments(merged, Moments(*other))
    return torch.stack(merged)


class Kurtosis(Metric):
    """Kurtosis of each site over all values seen, equal to that of the concatenated data.

    Args:
        sites: number of rows of the values that `update` receives.
        kwargs: passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    moments: Tensor

    def __init__(self, sites: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", default=torch.zeros(5, sites, dtype=torch.float64), dist_reduce_fx=_merge_all)

    def update(self, values: Tensor) -> None:
        """Add values ``[sites, ...]``; everything but the first dimension is pooled."""
        self.moments = torch.stack(merge_moments(Moments(*self.moments), moments(values.flatten(1))))

    def compute(self) -> Tensor:
        """Kurtosis ``[sites]``, float64; nan before the first update."""
        return kurtosis_of(Moments(*self.moments))
