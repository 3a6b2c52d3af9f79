"""Weight grids chosen by mean error, and weights rounded to nearest on them."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import (
    Grid,
    Quantized,
    Quantizer,
    asymmetric_grid,
    codes_on,
    split_groups,
    symmetric_grid,
    values_of,
)

ERROR_NORM = 2.4
SHRINK_STEPS = 80
SHRINK_GRID = 100
LOOK = 5
"""Ratios between two looks at which groups cannot find a better one."""
LEEWAY = 1e-3
"""Of an error, far more than what rounding makes of its sum."""


def search_grid(weight: Tensor, quantizer: Quantizer) -> Grid:
    """Grid of each output channel (and group) with the least error ``sum |Q(w) - w|^2.4`` over 80 clip ratios.

    The ratios are 1.00, 0.99, ... 0.21, multiplied by the quantizer's own ratio (QuaRot, arXiv 2404.00456, and GPTQ's
    code use the same search; the 2.4 norm is theirs). A group's search ends early where what a grid cuts off is
    alone more than the best error, since the grids to come cut off more.

    Args:
        weight: ``[out, in]``.
        quantizer: bits, symmetry, group size and the ratio the search starts from.

    Returns:
        Grid ``[out, groups]``.
    """
    # A few rows at a time stay in a processor's cache through all 80 steps: twice as fast as the whole matrix. A GPU
    # wants many at once.
    values = 1 << 18 if weight.device.type == "cpu" else 1 << 25
    scale, zero_point = zip(
        *(_search_rows(rows, quantizer) for rows in torch.split(weight, max(1, values // weight.shape[1]))),
        strict=True,
    )
    return Grid(torch.cat(scale), None if quantizer.symmetric else torch.cat(zero_point))


def _search_rows(rows: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    grouped = split_groups(rows, quantizer.group_size)
    # Groups one below the other. Those whose search has ended leave; `places` says which are left.
    values = grouped.flatten(0, -2)
    low, high = _ends(values, quantizer)
    best_error, places = torch.full_like(high, float("inf")), torch.arange(len(values), device=values.device)
    best_scale, best_zero = torch.ones_like(high), torch.zeros_like(high)
    for step in range(SHRINK_STEPS):
        ratio = 1 - step / SHRINK_GRID
        if quantizer.symmetric:
            grid = symmetric_grid(high * ratio, quantizer.bits)
        else:
            grid = asymmetric_grid(low * ratio, high * ratio, quantizer.bits)
        error = _errors(values_of(codes_on(values, grid, quantizer), grid).sub_(values))
        better = error < best_error[places]
        found = places[better]
        best_error[found], best_scale[found] = error[better], grid.scale[better]
        if grid.zero_point is not None:
            best_zero[found] = grid.zero_point[better]
        if step % LOOK == LOOK - 1:
            left = _least(values, low * ratio, high * ratio, grid) <= best_error[places]
            values, low, high, places = values[left], low[left], high[left], places[left]
    return best_scale.view(grouped.shape[:-1]), best_zero.view(grouped.shape[:-1])


def _ends(values: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """What the smallest and the largest code of each group's whole range stand for, ``[groups]`` both."""
    if not quantizer.symmetric:
        return values.amin(-1), values.amax(-1)
    smallest, largest = quantizer.code_range
    limit = values.abs().amax(-1)
    return limit * (smallest / largest), limit


def _errors(difference: Tensor) -> Tensor:
    """``sum |d|^2.4`` of each group, ``[groups, size]`` -> ``[groups]``; used up."""
    # Through base-2 logarithms: twice as fast as pow on a CPU, and 0 stays 0.
    return difference.abs_().log2_().mul_(ERROR_NORM).exp2_().sum(-1)


def _least(values: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """An error that no ratio still to come falls below: from what lies beyond the ends, which only close in.

    Of the m values there the mean of ``|d|^2.4`` is at least the mean of ``d^2`` to the power 1.2 (Jensen), which asks
    for no logarithm of each.
    """
    if grid.zero_point is not None:
        # A range holds zero, and its ends are off by up to half a step, since the zero point is rounded.
        low, high = low.clamp(max=0) - grid.scale / 2, high.clamp(min=0) + grid.scale / 2
    beyond = torch.minimum(torch.maximum(values, low.unsqueeze(-1)), high.unsqueeze(-1)).sub_(values)
    outside = beyond.sign().abs_().sum(-1).clamp_(min=1)
    mean = beyond.square_().sum(-1) / outside
    return mean.pow_(ERROR_NORM / 2) * outside * (1 - LEEWAY)


def round_to_nearest(weight: Tensor, grid: Grid, quantizer: Quantizer) -> Quantized:
    """Codes ``[out, in]`` of a weight on a given grid ``[out, groups]``, each rounded on its own (RTN)."""
    codes = codes_on(split_groups(weight, quantizer.group_size), grid, quantizer).reshape(weight.shape)
    return Quantized(codes.to(torch.int8 if quantizer.symmetric else torch.uint8), grid)
