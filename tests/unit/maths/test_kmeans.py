"""Levels against every way to cut sorted numbers into runs, and against uniform grids."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kurtail_pl.maths.kmeans import BINS, RUNS, best_levels, binned, on_levels, row_levels

Numbers = NDArray[np.float64]


def least_error(values: Numbers, weights: Numbers, count: int) -> float:
    """Over all cuts of the sorted values into so many runs, some of them empty."""
    order = np.argsort(values)
    x, w = values[order], weights[order]
    errors = []
    for cuts in combinations_with_replacement(range(len(x) + 1), count - 1):
        runs = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, len(x)), strict=True) if b > a]
        errors.append(sum(w[r] @ (x[r] - np.average(x[r], weights=w[r])) ** 2 for r in runs))
    return float(min(errors))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_no_other_levels_have_a_smaller_error(count: int, far: float) -> None:
    draw = np.random.default_rng(count)
    for _ in range(10):
        values, weights = draw.standard_t(2, 8) + far, draw.uniform(0.1, 5, 8)
        levels = best_levels(torch.from_numpy(values), torch.from_numpy(weights), count).numpy()
        assert levels.shape == (count,)
        assert (np.diff(levels) >= 0).all()
        found = weights @ np.square(values[:, None] - levels).min(1)
        assert found == pytest.approx(least_error(values, weights, count), rel=1e-9, abs=1e-12)


def test_fewer_values_than_levels_are_levels_themselves() -> None:
    values = torch.tensor([2.0, -1.0, 2.0, 0.5])
    levels = best_levels(values, torch.ones(4), 8)
    assert set(levels.tolist()) == {-1.0, 0.5, 2.0}
    assert (levels.diff() >= 0).all()
    with pytest.raises(ValueError, match="there are no values to find levels of"):
        best_levels(values[:0], values[:0], 2)


def test_equal_steps_are_a_uniform_grid() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        steps = (1 << bits) - 1
        levels = torch.linspace(-1, 1, steps + 1, dtype=torch.float64)
        grid = ((x.clamp(-1, 1) + 1) * steps / 2).round() * 2 / steps - 1
        torch.testing.assert_close(on_levels(x, levels), grid)


def test_bins_stand_for_their_numbers() -> None:
    """Their masses and means together; and a number alone in its bin is itself."""
    draw = torch.Generator().manual_seed(1)
    x, w = torch.rand(5000, generator=draw).double() * 2 - 1, torch.rand(5000, generator=draw).double()
    means, masses = binned(x, w)
    assert len(means) <= BINS
    assert float(masses.sum()) == pytest.approx(float(w.sum()))
    assert float(masses @ means) == pytest.approx(float(w @ x))
    ends = torch.tensor([-1.0, 1.0, 0.25])
    assert binned(ends, torch.ones(3))[0].tolist() == [-1.0, 0.25, 1.0]


def test_levels_of_bins_are_nearly_those_of_all_numbers() -> None:
    x = torch.randn(1500, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).clamp(-3, 3) / 3
    w = torch.ones_like(x)
    exact, coarse = best_levels(x, w, 16), best_levels(*binned(x, w), 16)
    errors = [float((x - on_levels(x, levels)).square().mean()) for levels in (exact, coarse)]
    assert errors[0] <= errors[1] <= 1.01 * errors[0]


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("n", [60, 300])
def test_levels_of_rows_are_nearly_the_best(power: int, n: int) -> None:
    """Against the exact search of each row; up to `RUNS` values they are the same."""
    draw = torch.Generator().manual_seed(n + power)
    rows, weights = torch.randn(5, n, generator=draw) ** power, torch.logspace(-2, 1, n).double()
    for count, found in zip((4, 8, 16), row_levels(rows, weights, (4, 8, 16)), strict=True):
        assert found.shape == (5, count)
        assert (found.diff(dim=1) >= 0).all()
        for row, levels in zip(rows.double(), found, strict=True):
            lost, least = (
                ((row - on_levels(row, each)).square() @ weights).item()
                for each in (levels, best_levels(row, weights, count))
            )
            assert lost == pytest.approx(least, rel=1e-4 if n <= RUNS else 0.02)


def test_rows_of_few_values_have_exactly_these() -> None:
    row = torch.tensor([-7.0, -1.0, 0.5, 90.0]).repeat(50)
    (four, eight) = row_levels(torch.stack([row, row * 0 + 3]), torch.ones(200), (4, 8))
    torch.testing.assert_close(four[0], torch.tensor([-7.0, -1.0, 0.5, 90.0]).double())
    assert set(eight[0].mul(2).round().tolist()) == {-14.0, -2.0, 1.0, 180.0}
    torch.testing.assert_close(four[1], torch.full((4,), 3.0).double())
    (nothing,) = row_levels(torch.zeros(2, 7), torch.zeros(7), (4,))
    assert nothing.eq(0).all()
