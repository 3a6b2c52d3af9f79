"""Perplexity as a torchmetrics class: the exponential of the mean negative log-likelihood of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from kurtail_pl.errors import NotFinite
from kurtail_pl.maths.finite import is_finite


class Perplexity(Metric):
    """Perplexity over all predicted tokens of all windows seen.

    torchmetrics' own class exponentiates to probabilities and back in the logits' dtype; this one adds
    log-likelihoods in float64.
    """

    is_differentiable = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, input_ids: Tensor) -> None:
        """Add windows.

        Args:
            logits: ``[batch, tokens, vocab]`` of the windows.
            input_ids: the windows, ``[batch, tokens]``; token t is predicted by the logits at t - 1.
        """
        for row, ids in zip(logits, input_ids, strict=True):
            # A slice at a time: the float32 log-softmax of a whole window is as large as its logits.
            for part, target in zip(row[:-1].split(512), ids[1:].split(512), strict=True):
                self.nll += F.cross_entropy(part.float(), target, reduction="sum").double()
        self.tokens += input_ids[:, 1:].numel()

    def compute(self) -> Tensor:
        """Perplexity, a float64 scalar; raises NotFinite when it is infinite or not a number."""
        perplexity = (self.nll / self.tokens).exp()
        if not is_finite(perplexity):
            raise NotFinite(
                f"perplexity is {perplexity.item()}: the mean negative log-likelihood of a token is "
                f"{(self.nll / self.tokens).item():.4g} nats; the model's values are too large: use another copy of it"
            )
        return perplexity
