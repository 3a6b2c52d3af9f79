"""Balanced scales against a numerical minimum, and against the error of a quantizer, behind a Hadamard or not."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.maths.scales import absmax_scale, balanced_scale, range_power

DRAW = torch.Generator().manual_seed(0)
ENERGY, WEIGHT = (torch.randn(2, 8, generator=DRAW, dtype=torch.float64) * 2).exp()


@pytest.mark.parametrize("power", [2.0, 5.0, 13.0])
def test_the_product_of_step_and_noise_is_least(power: float) -> None:
    energy, weight = ENERGY.numpy(), WEIGHT.numpy()

    def product(logarithm: np.ndarray) -> float:
        square = np.exp(2 * logarithm)
        step = 2 / power * np.log(((square * energy) ** (power / 2)).sum())
        return float(step + np.log((weight / square).sum()))

    found = minimize(product, np.zeros(8), tol=1e-12)
    scale = balanced_scale(ENERGY, WEIGHT, power)
    np.testing.assert_allclose(product(scale.log().numpy()), found.fun, rtol=0, atol=1e-9)
    np.testing.assert_allclose(scale.log().numpy(), found.x - found.x.mean(), atol=1e-4)


def test_a_quantizer_behind_a_hadamard_errs_less() -> None:
    """Channels of very different sizes, read by weights of other sizes; less of the scale, or more, errs more."""
    tokens, n, out = 512, 64, 48
    spread, reads = (torch.randn(2, n, generator=DRAW, dtype=torch.float64)).exp()
    x = torch.randn(tokens, n, generator=DRAW, dtype=torch.float64) * spread
    weight = torch.randn(out, n, generator=DRAW, dtype=torch.float64) * reads
    hadamard = random_hadamard(n, DRAW)
    scale = balanced_scale(x.square().mean(0), weight.square().sum(0))

    def error(s: torch.Tensor) -> float:
        rounded = fake_quantize(x * s @ hadamard, Quantizer(4)) @ hadamard.T / s
        return (((rounded - x) @ weight.T).norm() ** 2).item()

    assert error(scale) < 0.5 * error(torch.ones(n, dtype=torch.float64))
    assert error(scale) < min(error(scale**0.5), error(scale**1.5), error(1 / scale))


@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(4, symmetric=False)])
def test_a_quantizer_of_the_rows_themselves_errs_less(quantizer: Quantizer) -> None:
    """Its step is the range: less than what a Hadamard would have, and more than the range alone would, is right."""
    tokens, n, out = 1024, 256, 96
    spread, reads = (torch.randn(2, n, generator=DRAW, dtype=torch.float64) * torch.tensor([[0.4], [0.6]])).exp()
    x = torch.randn(tokens, n, generator=DRAW, dtype=torch.float64) * spread
    weight = torch.randn(out, n, generator=DRAW, dtype=torch.float64) * reads

    def error(power: float) -> float:
        s = balanced_scale(x.square().mean(0), weight.square().sum(0), power)
        return (((fake_quantize(x * s, quantizer) / s - x) @ weight.T).norm() ** 2).item()

    plain = (((fake_quantize(x, quantizer) - x) @ weight.T).norm() ** 2).item()
    assert error(range_power(n)) < min(0.6 * plain, 0.9 * error(2), 0.9 * error(1e6))
    assert range_power(2) == 2


def test_silent_and_unread_channels() -> None:
    scale = balanced_scale(torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 0]))
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert torch.equal(balanced_scale(torch.zeros(4), torch.zeros(4)), torch.ones(4))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_largest_magnitudes_are_shared(alpha: float) -> None:
    """Against numpy; at the ends all channels of W, or of x, span as much."""
    inputs, weights = ENERGY.numpy(), WEIGHT.numpy()
    scale = absmax_scale(ENERGY, WEIGHT, alpha).numpy()
    expected = weights ** (1 - alpha) / inputs**alpha
    np.testing.assert_allclose(scale / scale[0], expected / expected[0], rtol=1e-12)
    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-12)
    if alpha in (0, 1):
        span = inputs * scale if alpha else weights / scale
        np.testing.assert_allclose(span, span[0], rtol=1e-12)
    if alpha == 0.5:
        ratio = (inputs * scale) / (weights / scale)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)


def test_a_dead_channel_has_no_scale_of_its_own() -> None:
    """It counts as a thousandth of the root mean square."""
    scale = absmax_scale(torch.tensor([0.0, 1.0, 1.0]), torch.ones(3), 1.0)
    assert scale.isfinite().all()
    assert (scale[0] / scale[1]).item() == pytest.approx(1e3 / (2 / 3) ** 0.5, rel=1e-5)
