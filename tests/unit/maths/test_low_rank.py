"""Low-rank approximations against numpy's singular values and against alternating least squares."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.low_rank import DAMPING, low_rank, output_square

SHAPES = [(6, 5), (5, 6), (7, 7), (40, 13), (13, 40)]


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def hessian_of(columns: int, tokens: int = 50) -> Tensor:
    """Of inputs whose channels differ in size by a hundred."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    return x.T @ x


def damped(hessian: Tensor) -> np.ndarray:
    matrix = hessian.numpy()
    return matrix + DAMPING * np.mean(np.diag(matrix)) * np.eye(len(matrix))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_eckarts_and_youngs(shape: tuple[int, int], rank: int) -> None:
    """The squares of the singular values that are left out."""
    weight = weight_of(*shape)
    up, down = low_rank(weight, rank, None)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    left_out = np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]
    assert float((weight - up @ down).square().sum()) == pytest.approx(float((left_out**2).sum()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 50])
def test_the_weighted_error_is_that_of_the_weight_times_a_factor(shape: tuple[int, int], tokens: int) -> None:
    """With fewer tokens than inputs too: damping makes up for those that no token has."""
    weight, hessian = weight_of(*shape), hessian_of(shape[1], tokens)
    up, down = low_rank(weight, 2, hessian)
    error = (weight - up @ down).numpy()
    left_out = np.linalg.svd(weight.numpy() @ np.linalg.cholesky(damped(hessian)), compute_uv=False)[2:]
    found = float(np.einsum("ij,jk,ik->", error, damped(hessian), error))
    assert found == pytest.approx(float((left_out**2).sum()), rel=1e-10)
    assert output_square(torch.from_numpy(error), hessian) == pytest.approx(found, rel=1e-10)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_alternating_least_squares_do_better(shape: tuple[int, int], rank: int) -> None:
    """From many starts, each factor solved for the other in turn, in the metric of the damped Hessian."""
    weight, hessian = weight_of(*shape), hessian_of(shape[1])
    target, metric = weight.numpy(), damped(hessian)
    draw, least = np.random.default_rng(0), np.inf
    for _ in range(4):
        down = draw.standard_normal((rank, shape[1]))
        for _ in range(1000):
            up = target @ metric @ down.T @ np.linalg.inv(down @ metric @ down.T)
            down = np.linalg.inv(up.T @ up) @ up.T @ target
        error = target - up @ down
        least = min(least, float(np.trace(error @ metric @ error.T)))
    product = torch.matmul(*low_rank(weight, rank, hessian))
    assert output_square(weight - product, hessian) == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_full_rank_is_the_weight(shape: tuple[int, int], weighted: bool) -> None:
    weight = weight_of(*shape)
    up, down = low_rank(weight, min(shape), hessian_of(shape[1]) if weighted else None)
    torch.testing.assert_close(up @ down, weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)], ids=str)
def test_both_factors_have_the_same_share_of_the_range(shape: tuple[int, int]) -> None:
    up, down = low_rank(weight_of(*shape) * 1e8, 3, hessian_of(shape[1]) * 1e-12)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)], ids=str)
def test_nothing_to_weight_by_and_nothing_to_approximate(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    for found, expected in zip(low_rank(weight, 2, hessian_of(shape[1]) * 0), low_rank(weight, 2, None), strict=True):
        assert torch.equal(found, expected)
    for factor in low_rank(weight * 0, 2, hessian_of(shape[1])):
        assert factor.isfinite().all()


def test_a_hessian_that_is_none_raises() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        low_rank(weight_of(6, 5), 2, torch.diag(torch.tensor([1.0, 1, 1, 1, -1])).double())
