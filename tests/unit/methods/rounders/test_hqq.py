"""HQQ against scipy's minimum of each group's error, and the project's own search."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import HQQ, RTN, FloatZero, Moments, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.quantization import QuantizeSpec

NOTHING = Moments(None, None)


def weight(seed: int = 0) -> Tensor:
    """Groups with an offset: zero points matter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 128, generator=generator) + torch.rand(16, 2, generator=generator).repeat_interleave(64, 1)
    return 0.02 * x


def errors(x: Tensor, values: Tensor, scale: Tensor, norm: float) -> Tensor:
    """Of each group, in steps."""
    return ((values - x).view(16, 2, 64) / scale.unsqueeze(-1)).abs().pow(norm).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_is_worse_than_on_the_searched_grid(bits: int) -> None:
    weights, x = FloatZero(bits), weight()
    plain, fitted = weights.nearest(x), HQQ().codes(x, weights, NOTHING)
    assert torch.equal(plain.grid.scale, fitted.grid.scale)
    before, after = (errors(x, weights.values(q), plain.grid.scale, 0.7) for q in (plain, fitted))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()
    assert fitted.grid.zero_point is not None
    assert (fitted.grid.zero_point % 1 > 0).any()


def test_most_of_what_a_zero_point_can_give_is_found() -> None:
    """Half-quadratic splitting finds local minima: of what scipy's best of all zero points gains, more than half."""
    weights, x = FloatZero(3), weight()
    plain, fitted = weights.nearest(x), HQQ().codes(x, weights, NOTHING)
    scale, zero = fitted.grid
    assert zero is not None
    before, after = (float(errors(x, weights.values(q), scale, 0.7).sum()) for q in (plain, fitted))
    steps = (x.view(16, 2, 64) / scale.unsqueeze(-1)).double().numpy()

    def error(z: float, group: np.ndarray) -> float:
        codes = np.clip(np.round(group + z), 0, 7)
        return float((np.abs(group - (codes - z)) ** 0.7).sum())

    best = 0.0
    for row, group in np.ndindex(16, 2):
        ends = itertools.pairwise(np.linspace(float(zero[row, group]) - 0.5, float(zero[row, group]) + 0.5, 9))
        values = steps[row, group]
        best += min(minimize_scalar(error, bounds=each, args=(values,), method="bounded").fun for each in ends)
    assert before - after > 0.5 * (before - best)


def test_stored_zero_points_are_any_number() -> None:
    weights, x = FloatZero(4, group_size=32), weight()
    fitted = HQQ().codes(x, weights, NOTHING)
    back = weights.unpack(weights.pack(fitted), 128)
    assert torch.equal(weights.values(back), weights.values(fitted))


def test_zero_points_that_are_integers_have_nothing_to_be_fitted() -> None:
    with pytest.raises(ConfigError, match=r"HQQ fits zero points that are any number.*FloatZero"):
        QuantizeSpec(Scheme(Uniform(symmetric=False)), HQQ())
    QuantizeSpec(Scheme(FloatZero()), RTN())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"norm": 1.0}, "norm is 1.0"), ({"beta": 0.0}, "beta is 0.0"), ({"rounds": 0}, "rounds is 0")],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HQQ(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="any number is for asymmetric"):
        FloatZero(symmetric=True)
