"""Levels of each row's own: k-means against the exact search, widths against all choices, and storage."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.kmeans import best_levels
from kurtail_pl.methods import GPTQ, RTN, Format, Moments, Skim

ROWS, COLUMNS = 6, 64


def weight_of(seed: int = 0, columns: int = COLUMNS, rows: int = ROWS) -> Tensor:
    """Rows of sizes far apart, half of them with heavy tails."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw)
    x[::2] = x[::2] ** 3
    return x * torch.rand(rows, 1, generator=draw).mul(4).exp() + torch.linspace(-1, 1, rows)[:, None]


def hessian_of(columns: int = COLUMNS) -> Tensor:
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)).T @ x


def levels_in(codes: Tensor) -> list[int]:
    return [len(set(row)) for row in codes.tolist()]


def error_of(row: Tensor, levels: Tensor, counts: Tensor) -> float:
    return float(((row[:, None] - levels).abs().amin(1) ** 2) @ counts)


@pytest.mark.parametrize("by_inputs", [True, False])
def test_rows_lose_about_as_little_as_the_best_levels(by_inputs: bool) -> None:
    """By exact dynamic programming in float64; 8-bit integers of the levels take a part of it."""
    weight, counts = weight_of(columns=256), torch.ones(256, dtype=torch.float64)
    hessian = None
    if by_inputs:
        counts = torch.logspace(-2, 1, 256, dtype=torch.float64)
        hessian = torch.diag(counts)
    weights = Skim(3.0)
    own = weights.fitted(weight, hessian)
    found = own.nearest(weight)
    lost = (own.values(found).double() - weight.double()).square() @ counts
    for row, error, levels in zip(weight.double(), lost.tolist(), levels_in(found.codes), strict=True):
        width = next(bits for bits in (2, 3, 4) if levels <= 1 << bits)
        assert error <= 1.1 * error_of(row, best_levels(row, counts, 1 << width), counts)


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 3.4])
def test_no_other_rows_would_lose_less(average: float) -> None:
    """Of all widths of six rows, by the levels that each has alone, in 2, 3 and 4 bits."""
    weight = weight_of(1)
    found = Skim(average).nearest(weight)
    costs = []
    for bits in (2, 3, 4):
        alone = Skim(float(bits))
        costs.append(
            [float((alone.values(alone.nearest(row)) - row).double().square().sum()) for row in weight.split(1)]
        )
    choices = (c for c in product(range(3), repeat=ROWS) if sum(c) + 2 * ROWS <= average * ROWS)
    least = min(choices, key=lambda c: sum(costs[k][row] for row, k in enumerate(c)))
    assert Skim(average).pack(found)["widths"].tolist() == [2 + k for k in least]


@pytest.mark.parametrize("average", [2.0, 2.7, 3.0, 4.0])
@pytest.mark.parametrize("columns", [64, 172, 43])
@pytest.mark.parametrize("rounder", [RTN(), GPTQ()])
def test_what_is_stored_is_read_again(average: float, columns: int, rounder: RTN | GPTQ) -> None:
    weights, weight = Skim(average), weight_of(columns=columns)
    own = weights.fitted(weight, hessian_of(columns))
    quantized = rounder.codes(weight, own, Moments(hessian_of(columns), None))
    assert all(levels <= 16 for levels in levels_in(quantized.codes))
    stored = weights.pack(quantized)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == dict(weights.buffers(ROWS, columns))
    assert stored["widths"].sum() <= average * ROWS
    found = weights.unpack({name: tensor.clone() for name, tensor in stored.items()}, columns)
    assert torch.equal(found.codes, quantized.codes)
    assert torch.equal(weights.values(found), own.values(quantized))


def test_the_room_is_what_rows_of_the_average_take() -> None:
    """3 bits on average take no more than all rows in 3, and tables what half of them in 2 and half in 4 take."""
    buffers = Skim(3.0).buffers(100, 64)
    assert buffers["codes"].shape == (100 * 24,)
    assert buffers["levels"].shape == (50 * (4 + 16),)
    assert Skim(2.5).buffers(100, 64)["codes"].shape == (100 * 20,)
    assert Skim(2.5).buffers(100, 64)["levels"].shape == (75 * 4 + 25 * 16,)


def test_gptq_loses_less_than_rounding_to_nearest() -> None:
    weight, hessian = weight_of(2), hessian_of()
    own = Skim(3.0).fitted(weight, hessian)
    lost = []
    for found in (GPTQ().codes(weight, own, Moments(hessian, None)), own.nearest(weight)):
        error = own.values(found).double() - weight.double()
        lost.append(float(((error @ hessian) * error).sum()))
    assert lost[0] < lost[1]


def test_values_are_the_nearest_level_of_the_row() -> None:
    weight, weights = weight_of(3), Skim(3.0)
    found = weights.nearest(weight)
    values = weights.values(found).double()
    for row, mine in zip(weight.double(), values, strict=True):
        levels = mine.unique()
        least = (row[:, None] - levels).abs().amin(1)
        assert ((mine - row).abs() <= least + 1e-6 * row.abs().max()).all()


def test_zeros_stay_zeros_and_few_values_are_exact() -> None:
    weight = torch.zeros(3, COLUMNS)
    weight[1, 5] = 254.0
    weight[2] = torch.tensor([-127.0, 0.0, 3.0, 127.0]).repeat(COLUMNS // 4)
    for weights in (Skim(2.0), Skim(4.0)):
        found = weights.values(weights.unpack(weights.pack(weights.nearest(weight)), COLUMNS))
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)


def test_plain_data_and_back() -> None:
    assert Format.from_dict(Skim(2.5).to_dict()) == Skim(2.5)


@pytest.mark.parametrize("average", [1.9, 4.1])
def test_refusals(average: float) -> None:
    with pytest.raises(ConfigError, match=f"weights.average is {average}; output channels have 2 to 4 bits"):
        Skim(average)
    with pytest.raises(ConfigError, match="refine is 2"):
        GPTQ(refine=2).require(Skim())
