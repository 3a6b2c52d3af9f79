"""Quantization sensitivity against closed forms and integrals; Theorem 2.2 and Lemma 2.3 as properties."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.maths.orthogonal import nearest_orthogonal
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.maths.sensitivity import best_step, quantization_error, reduces_maximum, sensitivity

HALF_WIDTH = np.sqrt(3)
"""Of the uniform distribution of variance 1."""
FRACTIONS = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]


def uniform_error(step: float, bits: int) -> float:
    """Closed form: whole cells leave step^3 / 12 each, what is left beyond the last level its third power / 3."""

    def side(levels: int) -> float:
        last = min(round(HALF_WIDTH / step), levels)
        return last * step**3 / 12 + (HALF_WIDTH - last * step) ** 3 / 3

    return (side(2 ** (bits - 1) - 1) + side(2 ** (bits - 1))) / (2 * HALF_WIDTH)


def normal_error(step: float, bits: int) -> float:
    """Integral of the squared error over each level's cell; the outer cells have no end."""
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * step
    edges = [-np.inf, *(levels[:-1] + levels[1:]) / 2, np.inf]
    cells = zip(levels, edges[:-1], edges[1:], strict=True)
    density = scipy.stats.norm.pdf
    return sum(scipy.integrate.quad(lambda x, v=v: (x - v) ** 2 * density(x), a, b)[0] for v, a, b in cells)


ERRORS: dict[str, Callable[[float, int], float]] = {"uniform": uniform_error, "normal": normal_error}


def evenly(name: str, n: int = 1 << 17) -> Tensor:
    """The quantiles of n equal shares of a distribution of variance 1: a sample without chance."""
    shares = (np.arange(n) + 0.5) / n
    values = {"uniform": (2 * shares - 1) * HALF_WIDTH, "normal": scipy.stats.norm.ppf(shares)}
    return torch.from_numpy(values[name])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ERRORS)
def test_error_is_that_of_the_distribution(name: str, bits: int) -> None:
    steps = torch.tensor([0.3, 0.8, 1.0, 1.7, 4.0]) * 3.5 / 2**bits
    found = quantization_error(evenly(name), steps, bits)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([ERRORS[name](step, bits) for step in steps.tolist()], rel=1e-2)


@pytest.mark.parametrize("symmetric_clip", [0.7, 1.0])
def test_error_is_that_of_our_own_quantizer(symmetric_clip: float) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = symmetric_clip * values.abs().max() / 7
    quantized = fake_quantize(values, Quantizer(bits=4, symmetric=True, clip=Clip(amount=symmetric_clip)))
    expected = (values - quantized).square().mean()
    torch.testing.assert_close(quantization_error(values, step[None], 4)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("name", ERRORS)
def test_best_step_is_the_minimum(name: str, bits: int) -> None:
    cell = 2 * HALF_WIDTH / 2**bits
    lower, upper = {"uniform": (0.9, 1.2), "normal": (1.2, 2.2)}[name]
    expected = scipy.optimize.minimize_scalar(
        ERRORS[name], bounds=(lower * cell, upper * cell), args=(bits,), method="bounded"
    )
    step = best_step(evenly(name), bits)
    assert step.item() == pytest.approx(expected.x, rel=2e-3)
    assert ERRORS[name](step.item(), bits) == pytest.approx(expected.fun, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_step_is_better_than_the_best_one_where_the_tails_are_heavy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(20_000, generator=generator)
    values[torch.randint(20_000, (40,), generator=generator)] *= 10 ** (1 + seed / 2)
    best = quantization_error(values, best_step(values, 4)[None], 4)[0]
    others = quantization_error(values, torch.logspace(-3, 3.5, 400, dtype=torch.float64), 4)
    assert best <= others.min() * 1.001


def test_best_step_grows_with_the_values() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(best_step(1024 * values, 4), 1024 * best_step(values, 4), rtol=1e-6, atol=0)


def test_sensitivity_is_the_growth_of_the_error() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = sensitivity(values, torch.tensor(FRACTIONS), 4)
    x, step = values.numpy(), found.step.item()

    def error(s: float) -> float:
        return float(np.mean((x - s * np.clip(np.rint(x / s), -8, 7)) ** 2))

    assert found.error.item() == pytest.approx(error(step), rel=1e-12)
    expected = [abs(error(fraction * step) - error(step)) for fraction in FRACTIONS]
    assert found.growth.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert found.growth[FRACTIONS.index(1.0)] == 0
    assert (found.growth >= 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_theorem_2_2_uniform_is_less_sensitive_than_normal(bits: int, seed: int) -> None:
    """Above the best step, where it holds: random samples of a common, random variance."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 10 ** torch.empty((), dtype=torch.float64).uniform_(-2, 2, generator=generator)
    uniform = torch.empty(100_000, dtype=torch.float64).uniform_(-HALF_WIDTH, HALF_WIDTH, generator=generator)
    normal = torch.randn(100_000, dtype=torch.float64, generator=generator)
    fractions = torch.empty(8, dtype=torch.float64).uniform_(1.25, 3, generator=generator)
    growth = [sensitivity(deviation * values, fractions, bits).growth for values in (uniform, normal)]
    assert (growth[0] < growth[1]).all()


@pytest.mark.parametrize("bits", [4, 6])
def test_theorem_2_2_by_integration_and_where_it_ends(bits: int) -> None:
    steps = {name: best_step(evenly(name), bits).item() for name in ERRORS}

    def growth(name: str, fraction: float) -> float:
        step = steps[name]
        return ERRORS[name](fraction * step, bits) - ERRORS[name](step, bits)

    for fraction in (1.25, 1.5, 2.0, 3.0):
        assert growth("uniform", fraction) < growth("normal", fraction)
    # A step that is too small clips a uniform distribution, which has all its mass there, more than a normal one.
    for fraction in (0.5, 0.75):
        assert growth("uniform", fraction) > growth("normal", fraction)


def random_weight(generator: torch.Generator, size: int, condition: float) -> Tensor:
    """A square matrix of a given condition number."""
    left, right = (nearest_orthogonal(torch.randn(size, size, generator=generator)) for _ in range(2))
    return left @ torch.diag(torch.logspace(0, np.log10(condition), size, dtype=torch.float64)) @ right


@pytest.mark.parametrize("seed", range(6))
def test_lemma_2_3_condition_number_bounds_the_error_of_a_layer(seed: int) -> None:
    """``|xW - Q(x)W| / |xW| <= cond(W) |x - Q(x)| / |x|``, with the same condition number after rotation."""
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(generator, 32, condition=10 ** (1 + seed / 2))
    x = torch.randn(200, 32, dtype=torch.float64, generator=generator)
    x[:, seed] *= 50
    rotation = random_hadamard(32, generator)
    rotated, fused = x @ rotation, rotation.T @ weight
    torch.testing.assert_close(rotated @ fused, x @ weight)
    conditions = [np.linalg.cond(matrix.numpy()) for matrix in (weight, fused)]
    assert conditions == pytest.approx([10 ** (1 + seed / 2)] * 2, rel=1e-9)

    mean_bounds = []
    for inputs, matrix in ((x, weight), (rotated, fused)):
        quantized = fake_quantize(inputs, Quantizer(bits=4, symmetric=True, clip=Clip()))
        relative = (inputs - quantized).norm(dim=1) / inputs.norm(dim=1)
        error = ((inputs - quantized) @ matrix).norm(dim=1) / (inputs @ matrix).norm(dim=1)
        bound = conditions[0] * relative
        assert (error <= bound * (1 + 1e-9)).all()
        mean_bounds.append(bound.mean())
    # What the rotation gains is all in the error of the quantized input.
    assert mean_bounds[1] < 0.8 * mean_bounds[0]


def test_lemma_2_3_is_tight() -> None:
    weight = random_weight(torch.Generator().manual_seed(9), 16, condition=40.0)
    left, values, _ = torch.linalg.svd(weight)
    x, error = left[:, -1], 0.1 * left[:, 0]
    found = (error @ weight).norm() / (x @ weight).norm()
    torch.testing.assert_close(found, values[0] / values[-1] * error.norm() / x.norm())


def test_reduced_maxima_are_counted_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 50, 7, generator=generator)
    second[0, 0] = -first[0, 0].flip(0)  # equal: not smaller
    found = reduces_maximum(first, second)
    expected = [
        [max(map(abs, a)) < max(map(abs, b)) for a, b in zip(*rows, strict=True)]
        for rows in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert found.tolist() == expected
    assert not found[0, 0]
