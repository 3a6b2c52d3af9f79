"""Where a quantizer's grid ends: a share of the largest magnitude, or a quantile of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError, shortened


@dataclass(frozen=True)
class Clip:
    """Where a grid ends.

    Args:
        kind: ``ratio``, a share of the largest magnitude, or ``quantile`` of the magnitudes; with zero point, a share
            of the smallest and largest value, or the q- and (1-q)-quantiles of the values.
        amount: that share or quantile, in (0, 1].

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    kind: Literal["ratio", "quantile"] = "ratio"
    amount: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("ratio", "quantile"):
            raise ConfigError(f"clip.kind is {shortened(repr(self.kind), 40)}; write ratio or quantile")
        if not 0 < self.amount <= 1:
            raise ConfigError(f"clip.amount is {self.amount}; give a number in (0, 1]")

    def __str__(self) -> str:
        return f"{self.kind} {self.amount:g}"

    def largest(self, grouped: Tensor) -> Tensor:
        """Upper end for the values ``[..., n]`` of each group, ``[...]``."""
        return grouped.amax(-1) * self.amount if self.kind == "ratio" else upper_quantile(grouped, self.amount)

    def smallest(self, grouped: Tensor) -> Tensor:
        """Lower end."""
        return grouped.amin(-1) * self.amount if self.kind == "ratio" else -upper_quantile(-grouped, self.amount)


@dataclass(frozen=True, eq=False)
class LearnedClip(Clip):
    """A ratio while it learns: a tensor of one number, which multiplies as a float does, and has a gradient."""

    amount: Tensor = field(default_factory=lambda: torch.ones(()))  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """It may be anything on its way."""


def upper_quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of ``[..., n]`` with linear interpolation, equal to `torch.quantile`, without its full sort."""
    position = q * (x.shape[-1] - 1)
    below = int(position)
    top = x.topk(x.shape[-1] - below, dim=-1).values
    lower = top[..., -1]
    return lower if below == x.shape[-1] - 1 else torch.lerp(lower, top[..., -2], position - below)
