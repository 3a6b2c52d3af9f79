"""Rules for scales of channels: what is measured of inputs and weights, and the scale that this asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.maths.scales import SPREAD, absmax_scale, balanced_scale
from kurtail_pl.stages.fusion.channels import Held, Spread


class Rule(ABC):
    """From what channels hold, and what reads them, to their scales."""

    @abstractmethod
    def held(self, channels: Held) -> Tensor:
        """What counts of values that a quantizer reads as they are."""

    @abstractmethod
    def varied(self, channels: Spread) -> Tensor:
        """What counts of values whose mean may be subtracted before."""

    @abstractmethod
    def read(self, weight: Tensor) -> Tensor:
        """What counts of the weight ``[out, in]`` that reads the channels, ``[in]``."""

    @abstractmethod
    def joined(self, x: Tensor, dim: int) -> Tensor:
        """Of channels that have one scale, what counts of all of them."""

    @abstractmethod
    def paired(self, x: Tensor, pair: Tensor) -> Tensor:
        """The same where channels ``[..., n]`` have one scale by the number of their pair ``[n]``."""

    @abstractmethod
    def scale(self, held: Tensor, read: Tensor, power: float = SPREAD) -> Tensor:
        """Scales ``[..., n]`` of inputs; `power` of the norm that the quantizer's step goes with."""

    @abstractmethod
    def keys(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Scales ``[..., pairs]`` of keys, whose queries have the inverse."""


@dataclass(frozen=True)
class Balanced(Rule):
    """By mean squares, where the errors of a quantizer and of what multiplies them are least (`balanced_scale`)."""

    def held(self, channels: Held) -> Tensor:
        """Mean squares."""
        return channels.energy

    def varied(self, channels: Spread) -> Tensor:
        """Mean squares about the mean."""
        return channels.variance

    def read(self, weight: Tensor) -> Tensor:
        """Sums of squares."""
        return weight.square().sum(0)

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """The sum."""
        return x.sum(dim)

    def paired(self, x: Tensor, pair: Tensor) -> Tensor:
        """The sum."""
        return x.new_zeros(len(x), int(pair.max()) + 1).index_add(1, pair, x)

    def scale(self, held: Tensor, read: Tensor, power: float = SPREAD) -> Tensor:
        """With the least error."""
        return balanced_scale(held, read, power)

    def keys(self, keys: Tensor, queries: Tensor) -> Tensor:
        """With the least error of the scores."""
        return balanced_scale(keys, queries)


@dataclass(frozen=True)
class AbsMax(Rule):
    """By largest magnitudes: ``max|w|^(1 - alpha) / max|x|^alpha`` (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        alpha: how much of the range of inputs goes into the weights, from 0 to 1.
        key_alpha: how much of the range of keys goes into the queries; ``max|k|^-key_alpha`` is their scale
            (SmoothAttention of QServe, arXiv 2405.04532), whatever queries are.
        mean: of inputs and keys, take the mean magnitude over the tokens that are not massive.
    """

    alpha: float
    key_alpha: float
    mean: bool = False

    def held(self, channels: Held) -> Tensor:
        """The largest magnitudes, or their means."""
        return channels.mean if self.mean else channels.largest

    def varied(self, channels: Spread) -> Tensor:
        """The same."""
        return self.held(channels)

    def read(self, weight: Tensor) -> Tensor:
        """The largest magnitudes."""
        return weight.abs().amax(0)

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """The largest."""
        return x.amax(dim)

    def paired(self, x: Tensor, pair: Tensor) -> Tensor:
        """The largest."""
        return x.new_zeros(len(x), int(pair.max()) + 1).scatter_reduce(1, pair.expand_as(x), x, "amax")

    def scale(self, held: Tensor, read: Tensor, power: float = SPREAD) -> Tensor:
        """By `alpha`, whatever the norm."""
        return absmax_scale(held, read, self.alpha)

    def keys(self, keys: Tensor, queries: Tensor) -> Tensor:
        """By `key_alpha`."""
        return absmax_scale(keys, torch.ones_like(keys), self.key_alpha)
