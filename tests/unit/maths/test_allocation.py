"""The allocation of bits against a search of every assignment."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.allocation import allocate

BITS = (2, 3, 4, 6)


def costs_of(seed: int, layers: int = 5) -> Tensor:
    """Falling with the bits, as errors do, but of any shape."""
    steps = torch.rand(layers, len(BITS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return steps.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", [2, 2.2, 3, 3.5, 4.7, 6, 8])
def test_no_assignment_is_better(seed: int, average: float) -> None:
    costs = costs_of(seed)
    found = allocate(costs, BITS, average)
    assert len(found) == 5
    assert set(found) <= set(BITS)
    assert sum(found) <= average * 5

    def cost(assignment: tuple[int, ...] | list[int]) -> float:
        return sum(row[BITS.index(bits)].item() for row, bits in zip(costs, assignment, strict=True))

    assert cost(found) == pytest.approx(min(cost(a) for a in product(BITS, repeat=5) if sum(a) <= average * 5))


def test_costs_that_grow_get_the_fewest_bits() -> None:
    """A layer that noise helped is no reason to spend anything."""
    costs = torch.tensor([[-4.0, -2.0, -1.0, 0.0], [4.0, 2.0, 1.0, 0.0]])
    assert allocate(costs, BITS, 4) == [2, 6]


def test_one_part_that_most_choices_are_too_much_for() -> None:
    assert allocate(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), BITS, 3.5) == [3]
    assert allocate(torch.tensor([[4.0], [3.0]]), [3], 3.0) == [3, 3]


def test_an_average_that_float_cannot_hold() -> None:
    assert allocate(torch.tensor([[9.0, 1.0], [3.0, 1.0], [8.0, 1.0]]), (2, 4), 10 / 3) == [4, 2, 4]


def test_many_layers() -> None:
    """Equal layers share evenly: the costs are convex."""
    costs = torch.tensor([4.0**-bits for bits in range(2, 9)]).expand(126, 7)
    assert sorted(allocate(costs, range(2, 9), 3.5)) == [3] * 63 + [4] * 63


def greedily(costs: Tensor, bits: range, budget: int) -> float:
    """Least sum of convex costs: bit by bit to whom it helps most (SKIM)."""
    rows = [row.tolist() for row in costs]
    gains = [(row[k] - row[k + 1], part, k) for part, row in enumerate(rows) for k in range(len(row) - 1)]
    free = budget - bits[0] * len(rows)
    return sum(row[0] for row in rows) - sum(gain for gain, _, _ in sorted(gains, reverse=True)[:free])


@pytest.mark.parametrize("average", [2.0, 2.37, 3.0, 4.61, 8.0])
@pytest.mark.parametrize("alike", [False, True])
def test_bits_of_many_rows_go_where_they_help_most(average: float, alike: bool) -> None:
    """2000 rows of sizes far apart, or of only two sizes; both have convex errors."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randn(2000, 1, generator=draw, dtype=torch.float64).mul(2).exp()
    if alike:
        sizes = 1 + (sizes > 1).double()
    costs = sizes * torch.tensor([4.0**-bits for bits in range(2, 9)], dtype=torch.float64)
    found = allocate(costs, range(2, 9), average)
    assert sum(found) <= average * 2000
    cost = sum(row[bits - 2].item() for row, bits in zip(costs, found, strict=True))
    assert cost == pytest.approx(greedily(costs, range(2, 9), int(average * 2000)), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_many_groups_whose_costs_are_not_convex(seed: int) -> None:
    """600 groups in 2 or 4 bits: by steps of two bits a bit may be left, and the best ones get the wide ones."""
    costs = costs_of(seed, 600)[:, [0, 2]]
    found = allocate(costs, (2, 4), 2.501)
    wide = [bits == 4 for bits in found]
    assert sum(wide) == 150
    gains = costs[:, 0] - costs[:, 1]
    assert sorted(gains[wide].tolist()) == sorted(gains.tolist())[-150:]


@pytest.mark.parametrize(("parts", "within"), [(126, 1e-12), (400, 1e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_many_parts_of_any_costs_are_nearly_the_best(seed: int, parts: int, within: float) -> None:
    """Against dynamic programming over all of them; as many as a model has layers are exactly that (HIGGS)."""
    costs, budget = costs_of(seed, parts), int(3.3 * parts)
    found = allocate(costs, BITS, 3.3)
    least = np.full(budget + 1, np.inf)
    least[0] = 0
    for row in costs.tolist():
        tried = [
            np.concatenate([np.full(bits, np.inf), least[:-bits] + cost]) for bits, cost in zip(BITS, row, strict=True)
        ]
        least = np.min(tried, 0)
    cost = sum(row[BITS.index(bits)].item() for row, bits in zip(costs, found, strict=True))
    assert sum(found) <= budget
    assert least.min() * (1 - 1e-12) <= cost <= least.min() * (1 + within)


def test_too_few_bits() -> None:
    with pytest.raises(ValueError, match=r"average is 1.9 bits and the fewest of a part 2"):
        allocate(costs_of(0), BITS, 1.9)
