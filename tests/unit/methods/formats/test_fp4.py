"""Formats of small blocks against the OCP table, torch's own 8-bit types, and a brute force over codes and scales."""

import itertools

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.gptq import Settings, gptq
from kurtail_pl.methods import MXFP4, NVFP4, NVINT4, Format, MXFP4Plus

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
"""OCP Microscaling Formats 1.0, table 5."""


def weight(rows: int = 6, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_ties_go_to_the_even_mantissa(weights: Format) -> None:
    """The three rules of the table: what lies between two levels, on half the way, and beyond the last one."""
    for (code, low), high in zip(enumerate(E2M1), E2M1[1:], strict=False):
        for x, expected in ((low + 0.4 * (high - low), code), (high - 0.4 * (high - low), code + 1)):
            assert_code(weights, x, expected)
        assert_code(weights, (low + high) / 2, code if code % 2 == 0 else code + 1)
    assert_code(weights, 100.0, 7)


def assert_code(weights: Format, x: float, expected: int) -> None:
    codes, values = weights.on_grid(torch.tensor([x, -x]), torch.ones(2), None)
    assert codes.tolist() == [expected, expected + 8 if expected else 0]
    assert values.tolist() == [E2M1[expected], -E2M1[expected]]


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_values_are_the_nearest_that_the_scales_have(weights: Format) -> None:
    x = weight()
    quantized = weights.nearest(x)
    scale = quantized.grid.scale.repeat_interleave(weights.group_size or 1, 1).double()
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)], dtype=torch.float64)
    least = (x.double().unsqueeze(-1) - levels * scale.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((weights.values(quantized).double() - x).abs(), least, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4(), NVINT4(), MXFP4Plus()])
def test_what_is_stored_comes_back(weights: Format) -> None:
    quantized = weights.nearest(weight())
    stored = weights.pack(quantized)
    buffers = weights.buffers(6, 96)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == buffers
    back = weights.unpack(stored, 96)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.grid.scale, quantized.grid.scale)
    bits = 8 * sum(t.numel() * t.element_size() for t in stored.values()) / (6 * 96)
    assert bits == pytest.approx(4.25 if weights == MXFP4() else 4.5, rel=0.02)


def test_scales_of_mxfp4_are_what_torchs_e8m0_holds() -> None:
    scale = MXFP4().nearest(weight()).grid.scale
    stored = MXFP4().pack(MXFP4().nearest(weight()))["scale"]
    assert torch.equal(stored.view(torch.float8_e8m0fnu).float(), scale)


def test_scales_of_nvfp4_are_what_torchs_e4m3_holds_times_one_number() -> None:
    stored = NVFP4().pack(NVFP4().nearest(weight()))
    blocks = stored["blocks"].view(torch.float8_e4m3fn).float()
    assert torch.equal(blocks * stored["tensor_scale"], NVFP4().nearest(weight()).grid.scale)
    assert 224 < blocks.max() <= 448


def test_the_rule_of_ocp_is_never_better() -> None:
    """Its scale, 2^(floor(log2(largest)) - 2), is one of those that are tried, by the 2.4-norm of the search."""
    x = weight().view(6, 3, 32)
    ocp = torch.exp2(torch.floor(torch.log2(x.abs().amax(-1))) - 2)

    def error(scale: Tensor) -> Tensor:
        return (MXFP4().on_grid(x, scale.unsqueeze(-1), None)[1] - x).abs().pow(2.4).sum(-1)

    found = error(MXFP4().grid(weight()).scale)
    assert (found <= error(ocp)).all()
    assert (found < error(ocp)).any()
    for factor in (0.5, 2.0):
        assert (found <= error(ocp * factor) * (1 + 1e-6)).all()


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4(), NVINT4(), MXFP4Plus()])
def test_blocks_of_zeros_and_tiny_ones_beside_large_ones(weights: Format) -> None:
    x = torch.zeros(2, 96)
    x[0, :32] = 1e-6
    x[1, 32:64] = 3.0
    values = weights.values(weights.unpack(weights.pack(weights.nearest(x)), 96))
    assert values.isfinite().all()
    torch.testing.assert_close(values[1, 32:64], x[1, 32:64], rtol=0.04 if weights == NVINT4() else 0, atol=0)
    assert not values[:, 64:].any()
    zeros = torch.zeros(2, 96)
    assert torch.equal(weights.values(weights.unpack(weights.pack(weights.nearest(zeros)), 96)), zeros)


@pytest.mark.parametrize(("weights", "width"), list(itertools.product([MXFP4(), NVFP4(), NVINT4()], [40, 100])))
def test_widths_that_blocks_do_not_divide(weights: Format, width: int) -> None:
    with pytest.raises(ConfigError, match=rf"weights.group_size is {weights.group_size} .* {width} channels"):
        weights.require("weights", (96, width))


def tops(x: Tensor, scale: Tensor) -> Tensor:
    """What the largest number of a block may be, by hand."""
    levels = torch.arange(4, 8, 0.5, dtype=torch.float64)
    both = torch.cat([levels, -levels]) * scale.double().unsqueeze(-1)
    nearest = (x.double().unsqueeze(-1) - both).abs().argmin(-1, keepdim=True)
    return both.gather(-1, nearest).squeeze(-1)


def test_the_largest_of_each_block_has_three_bits_of_mantissa() -> None:
    """And all others are MXFP4's on the same scales."""
    x, weights = weight(40, 96), MXFP4Plus()
    quantized = weights.nearest(x)
    blocks, scale = x.view(40, 3, 32), quantized.grid.scale
    place = blocks.abs().argmax(-1)
    assert torch.equal(quantized.grid.zero_point, place.float())
    values = weights.values(quantized).view(40, 3, 32)
    largest = values.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    expected = tops(blocks.gather(-1, place.unsqueeze(-1)).squeeze(-1), scale)
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=0)
    others = MXFP4().on_grid(blocks, scale.unsqueeze(-1), None)[1].scatter(-1, place.unsqueeze(-1), 0)
    assert torch.equal(values.scatter(-1, place.unsqueeze(-1), 0), others)
    assert sorted(set((largest / scale).abs().flatten().tolist())) == [4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]


@pytest.mark.parametrize("seed", range(3))
def test_mxfp4_plus_loses_no_more_than_mxfp4_in_any_block(seed: int) -> None:
    """By the error of the search, for normal numbers and for those with outliers; and on the same scales by squares."""
    x = weight(400, 96, seed)
    x[::2, ::7] *= 6

    def error(weights: Format, power: float) -> Tensor:
        lost = weights.values(weights.nearest(x)) - x
        return lost.double().abs().pow(power).view(400, 3, 32).sum(-1)

    assert (error(MXFP4Plus(), 2.4) <= error(MXFP4(), 2.4) * (1 + 1e-6)).all()
    assert error(MXFP4Plus(), 2).sum() < 0.9 * error(MXFP4(), 2).sum()


def test_values_of_nvint4_are_the_nearest_integers_in_its_scales() -> None:
    x, weights = weight(), NVINT4()
    quantized = weights.nearest(x)
    assert quantized.codes.dtype == torch.int8
    assert (int(quantized.codes.min()), int(quantized.codes.max())) == (-8, 7)
    scale = quantized.grid.scale.repeat_interleave(16, 1).double()
    least = (x.double().unsqueeze(-1) - torch.arange(-8, 8) * scale.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((weights.values(quantized).double() - x).abs(), least, rtol=1e-5, atol=1e-9)
    stored = weights.pack(quantized)
    blocks = stored["blocks"].view(torch.float8_e4m3fn).float()
    assert torch.equal(blocks * stored["tensor_scale"], quantized.grid.scale)


@pytest.mark.parametrize("weights", [MXFP4Plus(), NVINT4(), NVFP4()])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_rounds_to_what_is_stored(weights: Format, act_order: bool) -> None:
    """Codes that it leaves stand for what it made up for: dequantized, they are the nearest of all in each column.

    The last column that is taken sees all errors of the others: solved by hand from the dequantized rest.
    """
    draw = torch.Generator().manual_seed(5)
    x, inputs = weight(8, 64, 1), torch.randn(400, 64, generator=draw) @ torch.randn(64, 64, generator=draw)
    hessian, settings = (inputs.T @ inputs).double(), Settings(act_order=act_order, block_size=16)
    quantized = gptq(x, hessian, weights.grid(x), weights, settings)
    back = weights.unpack(weights.pack(quantized), 64)
    values = weights.values(back).double()
    assert torch.equal(values, weights.values(quantized).double())
    damped = hessian + settings.percdamp * hessian.diagonal().mean() * torch.eye(64)
    last = int(hessian.diagonal().argsort(descending=True, stable=True)[-1]) if act_order else 63
    rest = [column for column in range(64) if column != last]
    best = x[:, last].double() + ((x.double() - values)[:, rest] @ damped[rest, last]) / damped[last, last]
    group = last // (weights.group_size or 1)
    found = values[:, last]
    scale = quantized.grid.scale[:, group].double()
    reachable = [level * scale for level in (*E2M1, *(-level for level in E2M1))]
    if weights == NVINT4():
        reachable = [level * scale for level in range(-8, 8)]
    least = torch.stack([(best - each).abs() for each in reachable]).amin(0)
    if weights == MXFP4Plus():
        place = x.view(8, 2, 32)[:, group].abs().argmax(-1)
        least = torch.where(place == last % 32, (best - tops(best, scale)).abs(), least)
    torch.testing.assert_close((found - best).abs(), least, rtol=1e-3, atol=1e-6)
