"""Directions, Cayley steps and retractions against dense solves and SciPy's polar decomposition."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.maths.orthogonal import (
    capped_step,
    cayley_step,
    nearest_orthogonal,
    orthogonality_error,
    skew_direction,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(count: int, n: int) -> Tensor:
    return torch.from_numpy(scipy.stats.ortho_group.rvs(n, size=count, random_state=0).reshape(count, n, n))


def skew(n: int, norm: float, seed: int = 0) -> Tensor:
    w = random(n, n, seed=seed)
    w = w - w.T
    scaled: Tensor = w * (norm / torch.linalg.matrix_norm(w))
    return scaled


def exact_cayley(x: Tensor, w: Tensor, step: float) -> Tensor:
    eye = torch.eye(len(x), dtype=x.dtype)
    result: Tensor = torch.linalg.solve(eye + step / 2 * w, (eye - step / 2 * w) @ x)
    return result


@pytest.mark.parametrize("n", [2, 5, 32])
def test_direction_is_skew_and_projects_on_the_tangent_space(n: int) -> None:
    x, momentum = rotations(3, n), random(3, n, n)
    w = skew_direction(x, momentum)
    torch.testing.assert_close(w, -w.mT, rtol=0, atol=1e-13)
    inner = x.mT @ momentum
    tangent = momentum - x @ (inner + inner.mT) / 2
    torch.testing.assert_close(w @ x, tangent, rtol=0, atol=1e-12)


def test_tangent_part_is_kept_and_normal_part_dropped() -> None:
    x = rotations(1, 8)[0]
    symmetric = random(8, 8) + random(8, 8).T
    tangent = x @ skew(8, norm=3.0)
    torch.testing.assert_close(skew_direction(x, tangent) @ x, tangent, rtol=0, atol=1e-13)
    torch.testing.assert_close(skew_direction(x, x @ symmetric), torch.zeros_like(x), rtol=0, atol=1e-12)


def test_direction_follows_the_formula() -> None:
    x, momentum = rotations(1, 4)[0], random(4, 4, seed=1)
    a = momentum @ x.T - 0.5 * x @ x.T @ momentum @ x.T
    torch.testing.assert_close(skew_direction(x, momentum), a - a.T)


@pytest.mark.parametrize("n", [2, 7, 24])
@pytest.mark.parametrize("step", [0.1, 1.0, 1.3])
def test_many_iterations_equal_the_exact_solve(n: int, step: float) -> None:
    x, w = rotations(1, n)[0], skew(n, norm=1.0)
    y = cayley_step(x, w, w @ x, torch.tensor(step, dtype=torch.float64), iterations=100)
    torch.testing.assert_close(y, exact_cayley(x, w, step), rtol=0, atol=1e-12)
    assert orthogonality_error(y).item() < 1e-12


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_each_iteration_adds_a_term_of_the_neumann_series(iterations: int) -> None:
    # From Y = X - 2 h X, k passes give (I - 2h + 2h^2 - ... +- 2h^(k+1)) X with h = step/2 W.
    x, h = rotations(1, 6)[0], 0.35 * skew(6, norm=1.0)
    series = torch.eye(6, dtype=x.dtype)
    for power in range(1, iterations + 2):
        series = series + 2 * torch.linalg.matrix_power(-h, power)
    w = skew(6, norm=1.0)
    y = cayley_step(x, w, w @ x, torch.tensor(0.7, dtype=torch.float64), iterations)
    moved = series @ x
    # One Newton-Schulz pass towards the nearest orthogonal matrix ends the step.
    polished = moved @ (1.5 * torch.eye(6).double() - 0.5 * moved.T @ moved)
    torch.testing.assert_close(y, polished, rtol=0, atol=1e-13)


def test_no_step_stays() -> None:
    x, w = rotations(2, 5), random(2, 5, 5)
    moved = cayley_step(x, w, w @ x, torch.zeros(2).double(), iterations=3)
    torch.testing.assert_close(moved, x, rtol=0, atol=1e-14)


def test_first_order_motion_is_along_minus_w() -> None:
    x, w, step = rotations(1, 5)[0], skew(5, norm=1.0), 1e-6
    y = cayley_step(x, w, w @ x, torch.tensor(step, dtype=torch.float64), iterations=5)
    torch.testing.assert_close((y - x) / step, -w @ x, rtol=0, atol=1e-5)


def test_step_is_capped_for_each_matrix() -> None:
    w = torch.stack([skew(6, norm=0.5), skew(6, norm=2.0), skew(6, norm=50.0), torch.zeros(6, 6).double()])
    steps = capped_step(1.5, w, q=0.5, eps=1e-8)
    assert steps.tolist() == pytest.approx([1.5, 1 / (2.0 + 1e-8), 1 / (50.0 + 1e-8), 1.5], rel=1e-12)
    assert capped_step(1.5, w, q=0.25, eps=0.1).tolist() == pytest.approx([0.5 / 0.6, 0.5 / 2.1, 0.5 / 50.1, 1.5])


@pytest.mark.parametrize("n", [2, 3, 16])
def test_capped_step_turns_by_at_most_2q_in_frobenius_norm(n: int) -> None:
    q, w = 0.5, skew(n, norm=30.0)
    x = rotations(1, n)[0]
    y = cayley_step(x, w, w @ x, capped_step(100.0, w, q, 1e-8), iterations=100)
    angles = np.angle(np.linalg.eigvals((y @ x.T).numpy()))
    turned = float(np.sqrt((angles**2).sum()))
    assert 0.9 * 2 * q < turned <= 2 * q


def test_orthogonality_error_is_the_largest_entry() -> None:
    x = torch.eye(3).repeat(3, 1, 1)
    x[1, 0, 1] = 1e-3  # X^T X - I has 1e-3 off the diagonal, 1e-6 on it
    x[2] *= 2
    error = orthogonality_error(x)
    assert error.dtype == torch.float64
    assert error.tolist() == pytest.approx([0, 1e-3, 3], rel=1e-6)
    scaled = torch.eye(3).double()
    scaled[0, 0] = 1 - 1e-12  # far below float32's resolution
    assert orthogonality_error(scaled).item() == pytest.approx(2e-12, rel=1e-3)


@pytest.mark.parametrize("n", [1, 4, 33])
def test_nearest_orthogonal_equals_scipy_polar(n: int) -> None:
    x = random(3, n, n) + 2 * torch.eye(n).double()
    expected = np.stack([scipy.linalg.polar(one.numpy())[0] for one in x])
    torch.testing.assert_close(nearest_orthogonal(x), torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("distance", [1e-12, 1e-6, 1e-3, 0.05, 0.2])
def test_near_an_orthogonal_matrix_it_equals_scipy_polar_too(distance: float) -> None:
    x = rotations(2, 12) + distance * random(2, 12, 12) / 12
    expected = np.stack([scipy.linalg.polar(one.numpy())[0] for one in x])
    torch.testing.assert_close(nearest_orthogonal(x), torch.from_numpy(expected), rtol=0, atol=1e-14)


def test_nearest_orthogonal_repairs_float32_drift_in_float64() -> None:
    rotation = rotations(2, 16)
    result = nearest_orthogonal((rotation + 1e-4 * random(2, 16, 16)).float())
    assert result.dtype == torch.float64
    assert orthogonality_error(result).max().item() < 1e-13
    torch.testing.assert_close(result, rotation, rtol=0, atol=1e-3)


def test_batched_equals_one_by_one() -> None:
    x, momentum = rotations(6, 5).reshape(2, 3, 5, 5), random(2, 3, 5, 5)
    w = skew_direction(x, momentum)
    step = capped_step(0.3, w, 0.5, 1e-8)
    y, error, near = cayley_step(x, w, w @ x, step, 5), orthogonality_error(momentum), nearest_orthogonal(momentum)
    assert step.shape == error.shape == (2, 3)
    for i in np.ndindex(2, 3):
        one = skew_direction(x[i], momentum[i])
        torch.testing.assert_close(w[i], one, rtol=0, atol=1e-14)
        torch.testing.assert_close(step[i], capped_step(0.3, one, 0.5, 1e-8), rtol=1e-14, atol=0)
        torch.testing.assert_close(y[i], cayley_step(x[i], one, one @ x[i], step[i], 5), rtol=0, atol=1e-14)
        torch.testing.assert_close(error[i], orthogonality_error(momentum[i]), rtol=1e-14, atol=0)
        torch.testing.assert_close(near[i], nearest_orthogonal(momentum[i]), rtol=0, atol=1e-13)
