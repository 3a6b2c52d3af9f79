"""Success rate of one rotation over another as a torchmetrics class (KurTail, Table 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kurtail_pl.maths.sensitivity import reduces_maximum


class SuccessRate(Metric):
    """Share of all tokens seen whose largest magnitude is smaller in the first tensor than in the second.

    Args:
        kwargs: passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    successes: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("successes", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add the same tokens under two rotations, both ``[..., tokens, channels]``."""
        smaller = reduces_maximum(first, second)
        self.successes += smaller.sum()
        self.tokens += smaller.numel()

    def compute(self) -> Tensor:
        """Share, a float64 scalar in [0, 1]; nan before the first update."""
        return self.successes.double() / self.tokens
