"""GPTQ: rounding that lets the columns still to come make up for each rounding error (arXiv 2210.17323).

Two corrections of it are there: GPTAQ (arXiv 2504.02692) and FOEM (arXiv 2507.11017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.descent import OutputError, refine
from kurtail_pl.maths.quantizers import Grid, Quantized

ALPHA = 0.25
"""Part of what the inputs lost that GPTAQ makes up for, as its authors' code has it."""
BETA = 0.2
"""Part of its deviation that FOEM takes back from a column, as its authors advise. Their code spares the first column
of each block; here the block size changes nothing but the speed."""
RATIOS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
"""Of the given scale of each output channel, that refinement starts from the best of."""


OnGrid = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Nearest codes of numbers ``[out]`` in scales with zero points or without, and what they stand for."""


class Levels(Protocol):
    """What codes stand for: a `Quantizer`, or a format of weights."""

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of codes."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""

    @property
    def fits_scales(self) -> bool:
        """Whether refinement gives each group the scale that is best for its codes."""

    def storable(self, grid: Grid) -> Grid:
        """The nearest grid whose scales can be stored."""

    def in_column(self, column: int) -> OnGrid:
        """For numbers of one column of a weight."""


@dataclass(frozen=True)
class Settings:
    """Settings of GPTQ; the defaults are those of QuaRot's and SpinQuant's papers, with activation order.

    Args:
        block_size: columns whose errors are propagated together.
        percdamp: the mean of the Hessian's diagonal times this is added to the diagonal.
        act_order: take the columns by falling diagonal of the Hessian. Groups stay those of the original order
            (static groups), so the codes need no permutation when stored.
        correction: ``gptaq``: the columns still to come also make up for what each column's inputs lost against the
            float model's; ``foem``: each column goes back a part of the way that errors before it have moved it, and
            that part is not passed on; null: neither.
        refine: rounds of coordinate descent and, for levels that fit them, least-squares scales (`maths.descent`) on
            what GPTQ, run on several multiples of the grid, found best for each output channel; 0 leaves its codes and
            the grid as they are.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    block_size: int = 128
    percdamp: float = 0.01
    act_order: bool = True
    correction: Literal["gptaq", "foem"] | None = None
    refine: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}; give a positive number of columns")
        if not 0 < self.percdamp < math.inf:
            raise ConfigError(f"percdamp is {self.percdamp}; give a positive number, usually 0.01")
        if self.correction not in (None, "gptaq", "foem"):
            raise ConfigError(f"correction is {self.correction!r}; GPTQ has gptaq and foem, or null for none")
        if self.refine < 0:
            raise ConfigError(f"refine is {self.refine}; give 0 or more rounds")
        if self.refine and self.correction is not None:
            raise ConfigError(
                f"refine is {self.refine} and correction is {self.correction}; rounds of refinement would undo the "
                "correction: leave one out"
            )


def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, levels: Levels, settings: Settings, cross: Tensor | None = None
) -> Quantized:
    """Quantize a weight against the inputs it will see.

    Beside its arguments it holds one matrix of the Hessian's size and two of the weight's; with GPTAQ three of the
    Hessian's, with FOEM three of the weight's, with refinement five.

    Args:
        weight: ``[out, in]``.
        hessian: ``X^T X`` of the layer's inputs, ``[in, in]``, up to a factor; float32 or float64, which is then the
            type of its factorisation.
        grid: static grid ``[out, groups]``, from `search_grid`.
        levels: that codes stand for; refinement asks for evenly spaced ones.
        settings: block size, damping, column order, correction, refinement.
        cross: ``X^T Y`` of the float model's inputs X and those of the Hessian, Y, of the same tokens, ``[in, in]``;
            GPTAQ alone asks for it.

    Returns:
        Codes ``[out, in]`` on the given grid; with refinement its scales change.

    Raises:
        torch.linalg.LinAlgError: when the damped Hessian is not positive definite.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    # An input that is always zero asks nothing of its column; the mean of the others keeps the damping what it is.
    diagonal[dead] = diagonal[~dead].mean() if dead.logical_not().any() else 1
    damping = settings.percdamp * diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not settings.act_order:
        order = torch.arange(len(order), device=weight.device)
    # The column that is taken first comes last: a Cholesky factor of the Hessian in this order is, inverted, the
    # (reversed) one of the inverse that GPTQ asks for, at the square root of the condition.
    order = order.flip(0)
    factor = hessian[order[:, None], order]
    factor.diagonal().copy_((diagonal + damping)[order])
    _invert_factor(factor, settings.block_size)
    lost = None
    if settings.correction == "gptaq":
        assert cross is not None
        lost = _lost_inputs((cross - hessian)[order[:, None], order], factor)
    factor = factor.float()

    def solved(grid: Grid) -> Quantized:
        # Columns are taken one at a time: held as rows, each is contiguous.
        columns = weight.float().T[order]
        columns[dead[order]] = 0
        codes = _solve(columns, factor, grid, order, levels, settings, lost)
        unordered = torch.empty_like(codes)
        unordered[order] = codes
        return Quantized(unordered.T.contiguous(), grid)

    if not settings.refine:
        return solved(grid)
    error = OutputError(weight, hessian, float(damping))
    scaled = (levels.storable(grid._replace(scale=grid.scale * ratio)) for ratio in RATIOS)
    best = _best_rows(map(solved, scaled), error)
    refined = refine(error, best, levels.code_range, settings.refine, settings.block_size, levels.fits_scales)
    return refined._replace(grid=levels.storable(refined.grid))


def _best_rows(found: Iterator[Quantized], error: OutputError) -> Quantized:
    """Of each output channel the codes and scales with the least error, from several for the whole weight."""
    best = next(found)
    least = error.of_rows(best)
    for other in found:
        errors = error.of_rows(other)
        better = (errors < least)[:, None]
        least = torch.minimum(errors, least)
        scale = torch.where(better, other.grid.scale, best.grid.scale)
        best = Quantized(torch.where(better, other.codes, best.codes), best.grid._replace(scale=scale))
    return best


def _invert_factor(matrix: Tensor, block_size: int) -> None:
    """Replace a positive definite ``[n, n]`` by ``L^-1`` of its Cholesky factorisation ``L L^T``, in place."""
    # The transposed view of a symmetric matrix is laid out as LAPACK wants it: nothing is copied.
    torch.linalg.cholesky(matrix.mT, out=matrix.mT)
    # The factor now stands, transposed, in the upper half; its inverse is made block by block from the last.
    lower = matrix.mT
    for start in reversed(range(0, len(lower), block_size)):
        block, below = slice(start, start + block_size), slice(start + block_size, None)
        eye = torch.eye(len(lower[block]), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower[block, block], eye, upper=False)
        lower[below, block] = -(lower[below, below] @ (lower[below, block] @ inverse))
        lower[block, block] = inverse


def _lost_inputs(difference: Tensor, factor: Tensor) -> Tensor:
    """P of GPTAQ: row j says how a weight in column j moves those before, for what its inputs lost.

    Row j of ``(X - Y)^T Y``, up to column j, times the inverse of the Hessian up to there: a Cholesky factor's inverse
    has that of every leading block, so one product with its masked half does them all (so does the paper).

    Args:
        difference: ``(X - Y)^T Y``, ``[in, in]``; used up.
        factor: as `_solve` has it.
    """
    masked = torch.mm(difference, factor).tril_(-1)
    return torch.mm(masked, factor.T, out=difference).mul_(ALPHA).float()


def _solve(
    columns: Tensor,
    factor: Tensor,
    grid: Grid,
    order: Tensor,
    levels: Levels,
    settings: Settings,
    lost: Tensor | None,
) -> Tensor:
    """Codes of the columns ``[in, out]``, taken from the last to the first; ``columns`` is used up.

    Args:
        columns: of the weight, in their order.
        factor: upper half of ``[in, in]``: row i of its transpose says how an error in column i moves those before.
        grid: of each output channel and group.
        order: of each column, its place in the weight.
        levels: that codes stand for.
        settings: block size and correction.
        lost: of GPTAQ (`_lost_inputs`).
    """
    kept = columns.clone() if settings.correction == "foem" else None
    codes = torch.empty_like(columns, dtype=levels.code_dtype)
    scales = grid.scale.float().T.contiguous()
    zeros = None if grid.zero_point is None else grid.zero_point.float().T.contiguous()
    places, size = order.tolist(), len(columns) // len(scales)
    groups = [place // size for place in places]
    for stop in range(len(columns), 0, -settings.block_size):
        start = max(stop - settings.block_size, 0)
        errors = torch.empty_like(columns[start:stop])
        local = factor[start:stop, start:stop].T.contiguous()
        for i in reversed(range(stop - start)):
            j = start + i
            column, scale, zero = columns[j], scales[groups[j]], None if zeros is None else zeros[groups[j]]
            if kept is not None:
                column.lerp_(kept[j], BETA)
            codes[j], value = levels.in_column(places[j])(column, scale, zero)
            passed_on = column if kept is None else column.lerp(kept[j], BETA)
            errors[i] = (passed_on - value) / local[i, i]
            columns[start:j].addr_(local[i, :i], errors[i], alpha=-1)
            if lost is not None:
                columns[start:j].addr_(lost[j, start:j], column)
        columns[:start].addmm_(factor[:start, start:stop], errors, alpha=-1)
        if lost is not None:
            columns[:start].addmm_(lost[start:stop, :start].T, columns[start:stop])
    return codes
