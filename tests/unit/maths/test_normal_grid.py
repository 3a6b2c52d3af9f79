"""Normal grids against published errors, numerical integration and Lloyd's two conditions; codes against all levels."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.maths.normal_grid import (
    normal_error,
    normal_levels,
)
from kurtail_pl.methods import Normal

BITS = range(2, 9)
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Max 1960, table I: mean square errors of 4, 8, 16 and 32 levels."""
MAX_LEVELS = {2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}


def edges_of(levels: Tensor) -> np.ndarray:
    inner = levels.numpy()
    return np.concatenate([[-np.inf], (inner[1:] + inner[:-1]) / 2, [np.inf]])


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_error_is_the_published_one(bits: int) -> None:
    assert normal_error(bits) == pytest.approx(PUBLISHED[bits], rel=3e-3)


@pytest.mark.parametrize("bits", MAX_LEVELS)
def test_levels_are_the_published_ones(bits: int) -> None:
    assert normal_levels(bits)[1 << (bits - 1) :].tolist() == pytest.approx(MAX_LEVELS[bits], rel=5e-4)


@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_the_mean_of_what_is_nearest_to_it(bits: int) -> None:
    levels = normal_levels(bits)
    assert levels.dtype == torch.float64
    assert levels.shape == (1 << bits,)
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))
    edges = edges_of(levels)
    for level, low, high in zip(levels.tolist(), edges[:-1], edges[1:], strict=True):
        mean = quad(lambda x: x * norm.pdf(x), low, high)[0] / quad(norm.pdf, low, high)[0]
        assert level == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_the_integral_of_the_squared_distance(bits: int) -> None:
    levels = normal_levels(bits)
    edges = edges_of(levels)
    cells = zip(levels.tolist(), edges[:-1], edges[1:], strict=True)
    total = sum(quad(lambda x, level=level: (x - level) ** 2 * norm.pdf(x), low, high)[0] for level, low, high in cells)
    assert normal_error(bits) == pytest.approx(total, rel=1e-6)


def test_each_bit_divides_the_error_by_nearly_four() -> None:
    """Zador's limit: pi sqrt(3) / 2 times 4^-bits when there are many levels."""
    ratios = [normal_error(bits) / normal_error(bits + 1) for bits in range(2, 8)]
    assert ratios == sorted(ratios)
    assert 3.3 < ratios[0] < ratios[-1] < 4
    assert normal_error(8) * 4**8 == pytest.approx(np.pi * 3**0.5 / 2, rel=0.01)


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("group_size", [None, 8, 12, 48])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_of_all_levels(bits: int, group_size: int | None) -> None:
    weight, quantizer = weight_of(5, 48), Normal(bits, group_size)
    quantized = quantizer.nearest(weight)
    values = quantizer.values(quantized)
    levels, size = normal_levels(bits).numpy(), group_size or 48
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == values.shape == weight.shape
    assert quantized.grid.scale.shape == (5, 48 // size)
    for i, row in enumerate(weight.numpy()):
        for j, value in enumerate(row):
            group = row[j // size * size : (j // size + 1) * size]
            scale = np.linalg.norm(group) / size**0.5
            nearest = np.abs(value - levels * scale).argmin()
            assert quantized.grid.scale[i, j // size].item() == pytest.approx(scale, rel=1e-12)
            assert quantized.codes[i, j] == nearest
            assert values[i, j].item() == pytest.approx(levels[nearest] * scale, rel=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_rotated_weight_loses_what_a_normal_one_does(bits: int) -> None:
    """HIGGS's claim: after a random rotation the relative square error is the grid's own, even of heavy tails."""
    weight = weight_of(256, 1024) ** 3
    rotated = weight @ random_hadamard(1024, torch.Generator().manual_seed(1))
    quantizer = Normal(bits)
    plain, turned = (
        (w - quantizer.values(quantizer.nearest(w))).square().sum() / w.square().sum() for w in (weight, rotated)
    )
    assert turned.item() == pytest.approx(normal_error(bits), rel=0.05)
    assert plain > 2 * turned


def test_half_precision_is_scaled_in_float32() -> None:
    weight = weight_of(3, 64)
    half = Normal(4).nearest(weight.half())
    assert half.grid.scale.dtype == torch.float32
    torch.testing.assert_close(
        half.grid.scale.double(), weight.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=0
    )


def test_a_group_of_zeros_stays_zero() -> None:
    weight, quantizer = weight_of(2, 16), Normal(3, 8)
    weight[1, 8:] = 0
    values = quantizer.values(quantizer.nearest(weight))
    assert not values[1, 8:].any()
    assert values.isfinite().all()
    assert values[1, :8].all()


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; .* 2 to 8"):
        Normal(bits)


def test_groups_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="group_size 5 does not divide the 16 channels"):
        Normal(4, 5).nearest(weight_of(2, 16))
