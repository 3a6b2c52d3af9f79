"""Losses of R1 against closed forms, SciPy and the best assignment found by brute force; their gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import yaml
from torch import Tensor

from kurtail_pl.cli.recipes import recipe_file
from kurtail_pl.maths.objectives import OBJECTIVES, objective_of

UNIFORM = torch.from_numpy(np.stack([np.linspace(-a, a, 4001) for a in (0.5, 1.0, 3.0)]))


def rows_of(rows: int = 5, width: int = 40, seed: int = 0) -> Tensor:
    """Skewed and heavy-tailed, each row on a scale of its own."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.exp() * torch.arange(1, rows + 1)[:, None] / rows - 1


def transport(row: np.ndarray) -> float:
    """Least mean square move of the values to uniform quantiles, over all assignments."""
    places = scipy.stats.uniform(-1, 2).ppf((np.arange(len(row)) + 0.5) / len(row))
    target = row.mean() + row.std() * np.sqrt(3) * places
    cost = (row[:, None] - target[None, :]) ** 2
    return float(cost[scipy.optimize.linear_sum_assignment(cost)].mean())


def kurtosis(values: np.ndarray) -> float:
    return float(scipy.stats.kurtosis(values, axis=None, fisher=False, bias=True))


BY_ROW: dict[str, Callable[[np.ndarray], float]] = {
    "token_kurtosis": lambda row: abs(kurtosis(row) - 1.8),
    "range": lambda row: float(np.ptp(row)) ** 2,
    "whip": lambda row: sum(np.exp(-abs(x)) for x in row),
    "wasserstein": transport,
}


@pytest.mark.parametrize("name", BY_ROW)
def test_each_row_is_taken_by_itself_and_their_mean_is_the_callers(name: str) -> None:
    rows, weights = rows_of(), torch.tensor([1.0, 0, 3, 1, 2], dtype=torch.float64)
    expected = [BY_ROW[name](row) for row in rows.numpy()]
    found = OBJECTIVES[name](rows, lambda x: (x * weights).sum() / weights.sum())
    assert found.item() == pytest.approx(np.average(expected, weights=weights), rel=1e-9)


def test_the_papers_kurtosis_is_that_of_all_rows() -> None:
    rows = rows_of()
    expected = abs(kurtosis(rows.numpy()) - 1.8)
    assert OBJECTIVES["kurtosis"](rows, Tensor.mean).item() == pytest.approx(expected, rel=1e-9)
    assert abs(OBJECTIVES["token_kurtosis"](rows, Tensor.mean).item() - expected) > 0.1


def test_nothing_is_wrong_with_uniform_rows() -> None:
    # 4001 equidistant values: kurtosis 1.8 - 12 / (5 (n^2 - 1)), variance near a^2 / 3 within a part in 2000.
    assert OBJECTIVES["token_kurtosis"](UNIFORM, Tensor.mean).item() == pytest.approx(
        12 / (5 * (4001**2 - 1)), rel=1e-3
    )
    assert OBJECTIVES["wasserstein"](UNIFORM, Tensor.mean).item() < 1e-6


def test_distance_of_the_normal_distribution() -> None:
    # W2^2 = 2 s^2 (1 - cor) with cor = E[z Phi(z)] sqrt(12) = sqrt(3 / pi); 100 000 quantiles miss the tails' 1e-5.
    row = torch.from_numpy(scipy.stats.norm(2, 3).ppf((np.arange(100_000) + 0.5) / 100_000))[None]
    expected = 2 * 9 * (1 - np.sqrt(3 / np.pi))
    assert OBJECTIVES["wasserstein"](row, Tensor.mean).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("target", [1.8, 3.56])
def test_kurtoses_have_a_target(target: float) -> None:
    """Of groups of 10 the mean of their kurtosis, however large each is; of all numbers; of each group."""
    rows, weights = rows_of().view(5, 4, 10), torch.tensor([1.0, 0, 3, 1, 2], dtype=torch.float64)
    of_groups = np.array([[kurtosis(group) for group in row] for row in rows.numpy()])

    def mean(x: Tensor) -> Tensor:
        return (x.reshape(5, -1).mean(1) * weights).sum() / weights.sum()

    found = objective_of("group_kurtosis", target)(rows, mean).item()
    assert found == pytest.approx(abs(np.average(of_groups.mean(1), weights=weights) - target), rel=1e-9)
    found = objective_of("token_kurtosis", target)(rows, mean).item()
    assert found == pytest.approx(np.average(abs(of_groups - target).mean(1), weights=weights), rel=1e-9)
    found = objective_of("kurtosis", target)(rows, Tensor.mean).item()
    assert found == pytest.approx(abs(kurtosis(rows.numpy()) - target), rel=1e-9)
    assert objective_of("range", 1.8) is OBJECTIVES["range"]


def test_the_target_for_e2m1_is_that_of_the_distribution_which_its_levels_suit() -> None:
    """Levels as dense as the cube root of a density err least on it (Panter and Dite): it goes with their gaps^-3."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = np.linspace(0, 6, 600_001)
    gaps = np.diff(levels)[np.searchsorted(levels, x, side="right").clip(1, 7) - 1]
    density = gaps**-3.0
    found = (density * x**4).mean() * density.mean() / (density * x**2).mean() ** 2
    assert round(float(found), 2) == 3.56
    recipe = yaml.safe_load(recipe_file("learned-blocks").read_text())
    assert recipe["model"]["init_args"]["objective"]["target"] == 3.56


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    rows = rows_of(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OBJECTIVES[name](x, Tensor.mean), (rows,))
