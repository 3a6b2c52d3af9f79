"""Rounders: what they ask for, what they refuse, and the output error that they leave, in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.gptq import gptq
from kurtail_pl.methods import (
    GPTQ,
    HQQ,
    MXFP4,
    NVFP4,
    NVINT4,
    RTN,
    FloatZero,
    Format,
    Moments,
    MXFP4Plus,
    Needs,
    Normal,
    Progressive,
    Rounder,
    Uniform,
)
from kurtail_pl.methods.cost import Sizes

NOTHING = Moments(None, None)
SIZES = Sizes(
    layers=1, hidden=8, widest=8, wide=64, stack=64, layer=64, active=64, attention=8, embedding=80, ends=16, stored=4
)
FORMATS: list[Format] = [
    Normal(2), Normal(3), Normal(4), Normal(4, 16), Uniform(3), Uniform(4, False, group_size=16),
    FloatZero(3, group_size=16), MXFP4(), NVFP4(), Uniform(4, False, 16, "float16"), Progressive(16),
    MXFP4Plus(), NVINT4(),
    Progressive(None),
]  # fmt: skip


def problem(outputs: int = 24, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that share a few directions."""
    draw = torch.Generator().manual_seed(inputs)
    shared = torch.randn(8 * inputs, inputs // 4, generator=draw, dtype=torch.float64)
    x = shared @ torch.randn(inputs // 4, inputs, generator=draw, dtype=torch.float64)
    x += 0.3 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=draw), x.T @ x


def output_error(rounder: Rounder, weights: Format, weight: Tensor, hessian: Tensor) -> float:
    """``||(W - V) X||^2`` of what is read again of the stored tensors."""
    quantized = rounder.codes(weight, weights, Moments(hessian, None))
    found = weights.unpack(weights.pack(quantized), weight.shape[1])
    lost = (weight - weights.values(found)).double()
    return ((lost @ hessian) * lost).sum().item()


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("rounder", [GPTQ(), GPTQ(block_size=7, act_order=False)], ids=str)
def test_gptq_errs_less_than_rtn_on_correlated_inputs(weights: Format, rounder: GPTQ) -> None:
    weight, hessian = problem()
    assert output_error(rounder, weights, weight, hessian) < 0.7 * output_error(RTN(), weights, weight, hessian)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_gptq_of_inputs_without_correlation_is_rtn(weights: Format) -> None:
    """No column can make up for another."""
    weight, _ = problem()
    diagonal = torch.linspace(1, 2, weight.shape[1], dtype=torch.float64).diag()
    found, expected = GPTQ().codes(weight, weights, Moments(diagonal, None)), RTN().codes(weight, weights, NOTHING)
    assert torch.equal(found.grid.scale, expected.grid.scale)
    torch.testing.assert_close(weights.values(found), weights.values(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [Uniform(3), Uniform(4, False, group_size=16), Progressive(16)], ids=str)
def test_refinement_lowers_the_error(weights: Format) -> None:
    weight, hessian = problem()
    plain, refined = (output_error(GPTQ(refine=n), weights, weight, hessian) for n in (0, 3))
    assert refined < 0.95 * plain
    GPTQ(refine=1).require(weights)


@pytest.mark.parametrize("rounder", [RTN(), GPTQ(), GPTQ(refine=3)], ids=str)
@pytest.mark.parametrize(
    "weights", [Uniform(3, scales="float16"), Uniform(4, False, 16, "float16"), Uniform(8, scales="float16")], ids=str
)
def test_whoever_sets_scales_keeps_them_to_float16(weights: Uniform, rounder: Rounder) -> None:
    """And loses next to nothing: a scale is off by 2^-8 at most, which is a quarter of the step of the search."""
    weight, hessian = problem()
    scale, zero_point = rounder.codes(weight, weights, Moments(hessian, None)).grid
    held = [scale] if zero_point is None else [scale, scale * zero_point]
    assert all(torch.equal(each.half().float(), each) for each in held)
    plain = output_error(rounder, replace(weights, scales="float32"), weight, hessian)
    assert output_error(rounder, weights, weight, hessian) < 1.1 * plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(5, False, scales="float16"), "scales is float16 and the weights are asymmetric in 5 bits"),
        (lambda: FloatZero(scales="float16"), "weights.scales is float16, .*; write scales: float32"),
        (lambda: Uniform(scales="float8"), "scales is 'float8': Input should be 'float32' or 'float16'"),  # type: ignore[arg-type]
    ],
)
def test_scales_that_cannot_be_kept_so_are_refused(make: Callable[[], Format], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("weights", [Normal(), NVFP4(), MXFP4()], ids=str)
def test_levels_that_are_not_evenly_spaced_are_not_refined(weights: Format) -> None:
    GPTQ().require(weights)
    message = f"rounder.refine is 2 and the levels of {type(weights).__name__} are not evenly spaced; write refine: 0"
    with pytest.raises(ConfigError, match=message):
        GPTQ(refine=2).require(weights)


def test_gptaq_takes_the_float_inputs_into_account() -> None:
    """The same as the function that it calls, and other codes than without."""
    weight, hessian = problem()
    cross = hessian + 0.1 * hessian.roll(1, 0)
    weights, rounder = Uniform(3), GPTQ(correction="gptaq")
    found = rounder.codes(weight, weights, Moments(hessian, cross))
    expected = gptq(weight, hessian, weights.grid(weight), weights, rounder, cross)
    assert torch.equal(found.codes, expected.codes)
    assert not torch.equal(found.codes, GPTQ().codes(weight, weights, Moments(hessian, cross)).codes)


def test_what_each_needs() -> None:
    assert not RTN().needs
    assert not HQQ().needs
    assert GPTQ().needs == GPTQ(correction="foem").needs == Needs.INPUTS
    assert GPTQ(correction="gptaq").needs == Needs.INPUTS | Needs.FLOAT_INPUTS
    assert [each.cost(SIZES).copies for each in (RTN(), GPTQ(), GPTQ(correction="foem"), GPTQ(refine=1))] == [
        0,
        2,
        3,
        5,
    ]


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_rtn_is_the_formats_nearest(weights: Format) -> None:
    weight, _ = problem()
    RTN().require(weights)
    found, expected = RTN().codes(weight, weights, NOTHING), weights.nearest(weight)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.grid.scale, expected.grid.scale)


@pytest.mark.parametrize("group_size", [None, 8, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_norm_that_it_is_for(bits: int, group_size: int | None) -> None:
    """Of errors in steps of the grid, group by group, from the searched grid's; scales stay."""
    weight, _ = problem(inputs=128)
    weights, rounder = FloatZero(bits, group_size=group_size), HQQ()
    rounder.require(weights)
    found, before = rounder.codes(weight, weights, NOTHING), weights.nearest(weight)
    assert torch.equal(found.grid.scale, before.grid.scale)
    size = group_size or 128

    def error(quantized: object) -> Tensor:
        values = weights.values(quantized)  # type: ignore[arg-type]
        lost = ((weight - values).double().view(len(weight), -1, size)) / before.grid.scale.double()[..., None]
        return (lost.abs() ** rounder.norm).sum(-1)

    assert (error(found) <= error(before) * (1 + 1e-5)).all()
    assert error(found).sum() < 0.995 * error(before).sum()
    # Each code is still the nearest on its grid.
    nearest, _ = weights.on_grid(
        weight.view(len(weight), -1, size), *(t[..., None] for t in found.grid if t is not None)
    )
    assert torch.equal(nearest.flatten(1), found.codes.float())


def test_hqq_is_refused_where_zero_points_are_integers_or_missing() -> None:
    for weights in (Uniform(), Uniform(symmetric=False), Normal(), NVFP4(), Progressive()):
        with pytest.raises(ConfigError, match=r"HQQ fits zero points that are any.* kurtail_pl.methods.FloatZero"):
            HQQ().require(weights)


@pytest.mark.parametrize(
    ("change", "value"), [("norm", 0.0), ("norm", 1.0), ("beta", 0.0), ("kappa", -1.0), ("rounds", 0)]
)
def test_settings_of_hqq(change: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{change} is {value}; give a"):
        replace(HQQ(), **{change: value})
