"""Levels of numbers: k-means in one dimension, weighted and exact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BINS = 1024
"""Of numbers from -1 to 1 that are too many to be clustered one by one: a hundredth of a step between 16 levels."""

RUNS = 96
"""Of a row's values that may make clusters together."""
ROUNDS = 8
"""Of Lloyd's iterations after that."""
ROWS = 64
"""That are clustered at once: their errors stay in a processor's cache."""
SMALLEST = 1e-200
"""Mean weight of columns that all count for nothing."""


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
    """Error ``[..., n + 1, n + 1]`` of one level for values from i to j, j not included; infinite if j is below i."""
    m, s, q = (part.unsqueeze(-2) - part.unsqueeze(-1) for part in (mass, first, second))
    error = (q - s.square() / m.clamp(min=torch.finfo(m.dtype).tiny)).clamp_(min=0)
    error.diagonal(dim1=-2, dim2=-1).zero_()
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


def row_levels(values: Tensor, weights: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`best_levels` of each row of a matrix, nearly, in time that goes with its size.

    Dynamic programming finds the best clusters whose ends are among `RUNS` of the sorted values, which lie as densely
    as the cube root of the values' density, as the levels of a fine quantizer do (Panter and Dite 1951). Lloyd's
    iterations then move the ends to where they are best. With up to `RUNS` values in a row they have nothing to do.

    Args:
        values: ``[rows, n]``.
        weights: of the columns, ``[n]``, at least zero.
        counts: of levels, ascending.

    Returns:
        For each count ``[rows, count]``, float64, ascending; some twice where there are fewer different values.
    """
    # Columns that count for nothing count for very little, so that a row of them has levels.
    weights = weights.double() + torch.finfo(torch.float32).eps * weights.double().mean().clamp(min=SMALLEST)
    found = [_clustered(rows.double(), weights, counts) for rows in torch.split(values, ROWS)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _clustered(values: Tensor, weights: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`row_levels` of a few rows."""
    x, order = values.sort(1)
    w = weights[order]
    middle = x.mean(1, keepdim=True)
    x = x - middle
    zero = x.new_zeros(len(x), 1)
    sums = [torch.cat([zero, part.cumsum(1)], 1) for part in (w, w * x, w * x * x)]
    spread = torch.cat([((w[:, 1:] + w[:, :-1]).pow(1 / 3) * x.diff(dim=1).pow(2 / 3)).cumsum(1), zero], 1)
    runs = min(RUNS, x.shape[1])
    places = torch.arange(runs + 1, device=x.device).expand(len(x), -1).contiguous()
    if runs < x.shape[1]:
        inner = torch.searchsorted(spread[:, :-1].contiguous(), places[:, 1:-1] / runs * spread[:, -2:-1]) + 1
        places = torch.cat([places[:, :1], inner, zero.long() + x.shape[1]], 1)
    errors = _errors(*(part.gather(1, places) for part in sums))
    least, starts = errors[:, 0], []
    for _ in range(counts[-1] - 1):
        least, start = (least.unsqueeze(2) + errors).min(1)
        starts.append(start)
    found = []
    for count in counts:
        ends = [zero.long() + runs]
        for start in reversed(starts[: count - 1]):
            ends.append(start.gather(1, ends[-1]))
        found.append(_lloyd(x, sums, places.gather(1, torch.cat([zero.long(), *reversed(ends)], 1))) + middle)
    return found


def _lloyd(x: Tensor, sums: Sequence[Tensor], ends: Tensor) -> Tensor:
    """Means ``[rows, count]`` of clusters of sorted values, and of those that are nearest to each, and so on."""
    mass, first, _ = sums
    levels = ends[:, 1:].to(x)
    for number in range(ROUNDS):
        if number:
            ends[:, 1:-1] = torch.searchsorted(x, (levels[:, 1:] + levels[:, :-1]) / 2)
        masses, parts = (part.gather(1, ends).diff(dim=1) for part in (mass, first))
        # An empty cluster has its neighbour's level.
        levels = torch.where(masses > 0, parts / masses, -torch.inf).cummax(1).values
        levels = torch.where(levels.isfinite(), levels, levels.masked_fill(levels.isinf(), torch.inf).amin(1, True))
    return levels
