"""Refined codes against float64 brute force: no single code, no scale and no other pair of both does better."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.descent import OutputError, refine
from kurtail_pl.maths.gptq import RATIOS, gptq
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.methods import GPTQ

DAMPING = 0.3
QUANTIZERS = [Quantizer(4), Quantizer(3, False), Quantizer(3, True, group_size=5), Quantizer(4, False, group_size=10)]


def problem(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    shared = torch.randn(4 * inputs, inputs // 2, generator=generator, dtype=torch.float64)
    x = shared @ torch.randn(inputs // 2, inputs, generator=generator, dtype=torch.float64)
    x += torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / len(x)


def error_of(weight: Tensor, hessian: Tensor, values: Tensor) -> Tensor:
    """Float64 error of each row: ``e (H + damping I) e^T``."""
    lost = weight.double() - values
    return torch.einsum("oi,ij,oj->o", lost, hessian + DAMPING * torch.eye(len(hessian)).double(), lost)


def values_of(quantized: Quantized) -> Tensor:
    codes, (scale, zero_point) = quantized
    size = codes.shape[1] // scale.shape[1]
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    return (codes.double() - zeros.double().repeat_interleave(size, 1)) * scale.double().repeat_interleave(size, 1)


def refined(weight: Tensor, hessian: Tensor, quantizer: Quantizer, rounds: int, block_size: int = 7) -> Quantized:
    rounded = round_to_nearest(weight, search_grid(weight, quantizer), quantizer)
    return refine(OutputError(weight, hessian, DAMPING), rounded, quantizer.code_range, rounds, block_size)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_error_of_rows_is_that_of_the_dense_product(quantizer: Quantizer) -> None:
    weight, hessian = problem(6, 20)
    rounded = round_to_nearest(weight, search_grid(weight, quantizer), quantizer)
    found = OutputError(weight, hessian, DAMPING).of_rows(rounded)
    assert torch.allclose(found.double(), error_of(weight, hessian, values_of(rounded)), rtol=1e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_every_round_lowers_the_error(quantizer: Quantizer) -> None:
    weight, hessian = problem(12, 30)
    errors = torch.stack(
        [error_of(weight, hessian, values_of(refined(weight, hessian, quantizer, n))) for n in range(5)]
    )
    assert (errors.diff(dim=0) <= 1e-5 * errors[:-1]).all()
    assert errors[-1].sum() < 0.7 * errors[0].sum()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_no_other_single_code_is_better_in_the_end(quantizer: Quantizer) -> None:
    weight, hessian = problem(4, 20)
    found = refined(weight, hessian, quantizer, rounds=40)
    least = error_of(weight, hessian, values_of(found))
    low, high = quantizer.code_range
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    for column, code in product(range(20), range(low, high + 1)):
        codes = found.codes.clone()
        codes[:, column] = code
        assert (error_of(weight, hessian, values_of(Quantized(codes, found.grid))) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_scales_solve_the_least_squares_of_their_codes(quantizer: Quantizer) -> None:
    weight, hessian = problem(5, 20)
    found = refined(weight, hessian, quantizer, rounds=60)
    root = torch.linalg.cholesky(hessian + DAMPING * torch.eye(20).double()).T
    ones = Grid(torch.ones_like(found.grid.scale), found.grid.zero_point)
    steps = values_of(Quantized(found.codes, ones))
    groups = found.grid.scale.shape[1]
    for row in range(5):
        by_group = torch.block_diag(*steps[row].view(groups, -1, 1).unbind())  # [in, groups]
        best = torch.linalg.lstsq(root @ by_group, (root @ weight[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(found.grid.scale[row].double(), best, rtol=1e-3)


def test_blocks_change_nothing() -> None:
    weight, hessian = problem(16, 60)
    quantizer = Quantizer(4)
    rounded = round_to_nearest(weight, search_grid(weight, quantizer), quantizer)
    # As large a damping as the Hessian: where it is counted twice, or not at all, it shows.
    error = OutputError(weight, hessian.float(), float(hessian.diagonal().mean()))
    whole, blocks = (refine(error, rounded, quantizer.code_range, 2, size) for size in (60, 16))
    # A tie decided otherwise in float32 also moves later codes of its row.
    assert (whole.codes != blocks.codes).double().mean() < 5e-3


def test_two_codes_of_a_row_reach_the_best_of_all_pairs() -> None:
    """With correlated columns, where nothing but a search of both together is sure to find it, mostly."""
    quantizer, hessian = Quantizer(3), torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double()
    weight = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    found = gptq(weight, hessian, search_grid(weight, quantizer), quantizer, GPTQ(percdamp=DAMPING, refine=20))
    low, high = quantizer.code_range
    pairs = torch.tensor(list(product(range(low, high + 1), repeat=2)))
    of_pairs = torch.stack([error_of(weight, hessian, pair.double() * found.grid.scale.double()) for pair in pairs])
    assert (error_of(weight, hessian, values_of(found)) <= of_pairs.amin(0) * (1 + 1e-5)).double().mean() > 0.95


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_gptq_refined_is_better_than_on_any_of_the_grids_it_tried(quantizer: Quantizer) -> None:
    weight, hessian = problem(12, 30)
    percdamp = DAMPING / float(hessian.diagonal().mean())
    grid = search_grid(weight, quantizer)
    found = gptq(weight, hessian, grid, quantizer, GPTQ(percdamp=percdamp, refine=1))
    tried = torch.stack([
        error_of(weight, hessian, values_of(gptq(weight, hessian, scaled, quantizer, GPTQ(percdamp=percdamp))))
        for scaled in (Grid(grid.scale * ratio, grid.zero_point) for ratio in RATIOS)
    ])  # fmt: skip
    assert (error_of(weight, hessian, values_of(found)) <= tried.amin(0) * (1 + 1e-5)).all()


def test_a_row_and_a_column_of_zeros_stay_finite() -> None:
    weight, hessian = problem(3, 10)
    weight[1], hessian[2], hessian[:, 2] = 0, 0, 0
    quantizer = Quantizer(4)
    found = gptq(weight, hessian, search_grid(weight, quantizer), quantizer, GPTQ(refine=2))
    assert found.grid.scale.isfinite().all()
    assert (found.grid.scale > 0).all()
    assert not found.codes[1].any()
