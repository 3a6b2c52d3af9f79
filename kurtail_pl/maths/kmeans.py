"""Levels of numbers: k-means in one dimension, weighted and exact."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BINS = 1024
"""Of numbers from -1 to 1 that are too many to be clustered one by one: a hundredth of a step between 16 levels."""

ROUNDS = 30
"""Of Lloyd's iterations: levels then hardly move."""
ROWS = 1024
"""That are clustered at once."""


def best_levels(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The levels with the least ``sum(weights (values - level)^2)``, each value on its nearest.

    In one dimension clusters are runs of the sorted values, and dynamic programming over where they end finds the best
    ones (Wang and Song, "Ckmeans.1d.dp", The R Journal 2011), where Lloyd's iterations end in a local minimum.

    Args:
        values: ``[n]``; memory and time go with the square of n.
        weights: ``[n]``, above zero.
        count: of levels.

    Returns:
        ``[count]``, float64, in ascending order; some twice where there are fewer different values.

    Raises:
        ValueError: when there are no values.
    """
    if not len(values):
        raise ValueError("there are no values to find levels of; give some")
    order = values.argsort()
    x, w = values[order].double(), weights[order].double()
    middle = x.mean()  # Sums of squares far from zero would cancel.
    x = x - middle
    mass, first, second = (_from_zero(part) for part in (w, w * x, w * x * x))
    best = _errors(mass, first, second)
    errors, starts = best[0], []
    for _ in range(count - 1):
        errors, start = (errors.unsqueeze(1) + best).min(0)
        starts.append(start)
    ends = [len(x)]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    runs = [(begin, end) for begin, end in pairwise([0, *reversed(ends)]) if end > begin]
    levels = [(first[end] - first[begin]) / (mass[end] - mass[begin]) for begin, end in runs]
    return torch.stack(levels + levels[-1:] * (count - len(levels))) + middle


def _from_zero(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n numbers."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def _errors(mass: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Error ``[n + 1, n + 1]`` of one level for the values from i to j, j not included; infinite where j is below i."""
    m, s, q = (part.unsqueeze(0) - part.unsqueeze(1) for part in (mass, first, second))
    error = (q - s.square() / m.clamp(min=torch.finfo(m.dtype).tiny)).clamp_(min=0)
    error = error.fill_diagonal_(0)
    return error.masked_fill_(torch.ones_like(error, dtype=torch.bool).tril_(-1), torch.inf)


def binned(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer numbers that stand for many from -1 to 1: means of bins, and sums of their weights, ``[at most BINS]``."""
    x, w = values.double().flatten(), weights.double().flatten()
    place = ((x + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    mass, first = (torch.bincount(place, part, minlength=BINS) for part in (w, w * x))
    seen = mass > 0
    return first[seen] / mass[seen], mass[seen]


def on_levels(x: Tensor, levels: Tensor) -> Tensor:
    """The level ``[count]``, in ascending order, nearest to each number; the lower one of two as near."""
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def row_levels(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Levels of each row of many numbers by k-means (Lloyd's iterations), which the exact search takes too long for.

    They begin where a quantizer of many levels has them, as densely as the cube root of the numbers' density (Panter
    and Dite 1951), and each is in turn the mean of the numbers that it is nearest to. Errors only fall.

    Args:
        values: ``[rows, n]``.
        weights: of the columns, ``[n]``, at least zero.
        count: of levels.

    Returns:
        ``[rows, count]``, float64, in ascending order; some twice where there are fewer different values.
    """
    # Columns that count for nothing count for very little, so that a row of them has levels.
    weights = weights.double() + torch.finfo(torch.float32).eps * weights.double().mean().clamp(min=1e-300)
    return torch.cat([_lloyd(rows.double(), weights, count) for rows in torch.split(values, ROWS)])


def _lloyd(values: Tensor, weights: Tensor, count: int) -> Tensor:
    x, order = values.sort(1)
    w = weights[order]
    middle = x.mean(1, keepdim=True)
    x = x - middle
    zero = x.new_zeros(len(x), 1)
    mass, first = (torch.cat([zero, part.cumsum(1)], 1) for part in (w, w * x))
    spread = torch.cat([zero, ((w[:, 1:] + w[:, :-1]).pow(1 / 3) * x.diff(dim=1).pow(2 / 3)).cumsum(1)], 1)
    wanted = (torch.arange(count).to(x) + 0.5) / count * spread[:, -1:]
    levels = x.gather(1, torch.searchsorted(spread, wanted).clamp_(max=x.shape[1] - 1))
    for _ in range(ROUNDS):
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.cat([zero.long(), torch.searchsorted(x, middles), (zero + x.shape[1]).long()], 1)
        masses, sums = (part.gather(1, ends).diff(dim=1) for part in (mass, first))
        levels = torch.where(masses > 0, sums / masses.clamp(min=torch.finfo(x.dtype).tiny), levels)
    return levels + middle
