"""Static grids against all grids tried on the values themselves, in float64."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.maths.static_grid import count_values, static_grid


def draw(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    return {
        "normal": normal,
        "uniform": torch.rand(20_000, generator=generator) * 3,
        "one side": normal.abs() ** 1.5 * 0.01,
        "far out": torch.cat([normal, torch.tensor([40.0, 35.0])]),
        "few below": torch.cat([normal + 4, torch.full((40,), -9.0)]),
    }[name]


def error(values: Tensor, scale: float, zero: int, low: int, high: int) -> float:
    codes = torch.clamp(torch.round(values / scale) + zero, low, high)
    return ((codes - zero) * scale - values).square().mean().item()


@pytest.mark.parametrize("values", ["normal", "uniform", "one side", "far out", "few below"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_grid_is_better(values: str, symmetric: bool, bits: int) -> None:
    x = draw(values)
    grid = static_grid(count_values(x), Quantizer(bits, symmetric))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    zero = 0 if grid.zero_point is None else int(grid.zero_point.item())
    x, largest = x.double(), x.abs().max().item()
    scales = torch.logspace(-2.5, 0, 150, dtype=torch.float64) * 2 * largest / (high - low)
    zeros = [0] if symmetric else range(high + 1)
    best = min(error(x, scale, z, low, high) for scale in scales.tolist() for z in zeros)
    assert error(x, grid.scale.item(), zero, low, high) < 1.02 * best
    assert grid.scale.shape == (1,)
    assert grid.scale.dtype == torch.float32
    assert (grid.zero_point is None) == symmetric


def test_four_bits_of_a_normal_distribution() -> None:
    """The best step is 0.335 standard deviations (Max, 1960, Table II)."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 5
    assert static_grid(count_values(x), Quantizer(4)).scale.item() / 5 == pytest.approx(0.335, rel=0.03)


def test_counts_are_of_values_rounded_to_bfloat16_and_can_be_added() -> None:
    x = torch.tensor([[1.0, -2.5, 1.001], [0.0, 3e38, -1e-30]])
    counts = count_values(x)
    assert counts.sum() == 6
    assert torch.equal(counts, count_values(x[:1]) + count_values(x[1:]))
    expected = Counter(x.bfloat16().flatten().tolist())
    assert sorted(counts[counts > 0].tolist()) == sorted(expected.values())
    assert torch.equal(counts, count_values(x.bfloat16()))


def test_a_grid_ends_within_the_ratio() -> None:
    """Two values alone, which a grid to both ends would hold exactly."""
    counts = count_values(torch.tensor([-1.0, 1.0]))
    assert static_grid(counts, Quantizer(4, clip=Clip(amount=0.5))).scale.item() == pytest.approx(0.5 / 7)
    grid = static_grid(counts, Quantizer(4, False, clip=Clip(amount=0.5)))
    assert grid.scale.item() == pytest.approx(1 / 15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_have_scale_one(symmetric: bool) -> None:
    grid = static_grid(count_values(torch.zeros(5)), Quantizer(4, symmetric))
    assert grid.scale.tolist() == [1.0]
    assert grid.zero_point is None or grid.zero_point.tolist() == [0.0]
