"""The grids of least mean square error of the normal distribution (HIGGS, arXiv 2411.17525).

A weight that was rotated at random is nearly normal whatever it was, so that one grid for each width serves all weights
and no data is needed: a group is divided by its root mean square and each value goes to the nearest level (HIGGS,
Alg. 1, with grids of one dimension). The paper rotates each group for this by a Hadamard matrix of its own. Here the
rotations that are fused into the model, R1 to R5, have turned the inputs of every linear already, and nothing is left
to be undone where the weight is used; a model without rotations gets the grid, not the guarantee.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LLOYD_STEPS, NEWTON_STEPS = 100, 8
"""The first bring 4 to 256 levels to where the second, of which half would do, converge quadratically."""


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Levels of the scalar quantizer of N(0, 1) with the least mean square error (Lloyd 1982, Max 1960).

    Each level is the mean of the values nearest to it, of which there is one way only (Fleischer 1964). Lloyd's
    iterations begin at the levels that are best when there are many (Panter, Dite 1951); Newton's end them.

    Args:
        bits: of the codes.

    Returns:
        ``[2^bits]``, float64, ascending, symmetric about zero; not to be changed.

    >>> normal_levels(2)
    tensor([-1.5104, -0.4528,  0.4528,  1.5104], dtype=torch.float64)
    """
    count = 1 << bits
    levels = 3**0.5 * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(LLOYD_STEPS):
        edges, density = _cells(levels)
        levels = -density.diff() / torch.special.ndtr(edges).diff()
    for _ in range(NEWTON_STEPS):
        # Half the error's gradient: levels times the mass of their cells, less what the cells hold.
        edges, density = _cells(levels)
        mass = torch.special.ndtr(edges).diff()
        gradient = levels * mass + density.diff()
        # An edge is halfway between two levels: it moves by half of what either moves.
        below = 0.5 * (edges[:-1] - levels).nan_to_num(neginf=0) * density[:-1]
        above = 0.5 * (levels - edges[1:]).nan_to_num(neginf=0) * density[1:]
        hessian = torch.diag(mass + below + above) + torch.diag(above[:-1], 1) + torch.diag(below[1:], -1)
        levels = levels - torch.linalg.solve(hessian, gradient)
    symmetric: Tensor = (levels - levels.flip(0)) / 2
    return symmetric


def normal_error(bits: int) -> float:
    """Mean square error of `normal_levels` on N(0, 1), and so the relative square error of a normal weight.

    >>> f"{normal_error(4):.6f}"
    '0.009501'
    """
    levels = normal_levels(bits)
    # The values of a cell are on average its level: the error is what the levels lack of the variance.
    return 1 + (levels * _cells(levels)[1].diff()).sum().item()


def _cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of the levels' cells, the infinite ones included, and the density of N(0, 1) there: both ``[n + 1]``."""
    edges = torch.cat([levels.new_tensor([-torch.inf]), midpoints(levels), levels.new_tensor([torch.inf])])
    return edges, (-edges.square() / 2).exp() / (2 * torch.pi) ** 0.5


def midpoints(levels: Tensor) -> Tensor:
    """Where numbers go over from one level to the next, ``[n - 1]``."""
    return (levels[1:] + levels[:-1]) / 2
