"""Every format against brute force in float64: the levels that its stored tensors can say, and the nearest of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.normal_grid import normal_levels
from kurtail_pl.maths.quantizers import Grid, Quantized
from kurtail_pl.methods import (
    MXFP4,
    NVFP4,
    NVINT4,
    FloatZero,
    Format,
    Mixed,
    MXFP4Plus,
    Normal,
    Progressive,
    Skim,
    Uniform,
)
from kurtail_pl.methods.method import Method

ROWS, COLUMNS = 6, 96
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FORMATS: list[Format] = [
    *(
        Uniform(bits, symmetric, group_size=g)
        for bits in (2, 3, 4, 5, 8)
        for symmetric in (True, False)
        for g in (None, 8)
    ),
    Uniform(4, False),
    *(Normal(bits, group) for bits in (2, 3, 4, 5, 8) for group in (None, 8)),
    *(FloatZero(bits, group_size=group) for bits in (2, 4, 8) for group in (None, 8)),
    *(Progressive(group) for group in (None, 8)),
    MXFP4(),
    MXFP4Plus(),
    NVFP4(),
    NVINT4(),
]


def weight_of(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Heavy tails, columns of sizes far apart, and another mean in each row."""
    draw = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=draw) ** 3 * torch.logspace(-2, 1, columns)
    return x + torch.linspace(-1, 1, rows)[:, None]


def steps_of(weights: Format) -> Tensor:
    """Of every code, the level that it stands for in scales, before a zero point is taken off; float64."""
    if isinstance(weights, Uniform):
        top = 2**weights.bits
        return torch.arange(top).double() - (top // 2 if weights.symmetric else 0)
    if isinstance(weights, NVINT4):
        return torch.arange(-8, 8).double()
    if isinstance(weights, Progressive):
        return torch.arange(16).double()
    if isinstance(weights, Normal):
        return normal_levels(weights.bits).double()
    return torch.tensor([*E2M1, *(-level for level in E2M1)], dtype=torch.float64)


def levels_of(weights: Format, grid: Grid, columns: int) -> Tensor:
    """All that each number of a weight may become, ``[out, in, levels]`` float64."""
    size = columns // grid.scale.shape[1]
    scale = grid.scale.double().repeat_interleave(size, 1)[..., None]
    zero = 0 if grid.zero_point is None else grid.zero_point.double().repeat_interleave(size, 1)[..., None]
    if isinstance(weights, MXFP4Plus):
        is_top = zero == (torch.arange(columns) % size)[:, None]
        tops = torch.arange(4, 8, 0.5, dtype=torch.float64)
        return torch.where(is_top, torch.cat([tops, -tops]), steps_of(weights)) * scale
    return (steps_of(weights) - zero) * scale


def first_code(weights: Format) -> int:
    signed = isinstance(weights, NVINT4) or (isinstance(weights, Uniform) and weights.symmetric)
    return -(2 ** (weights.bits - 1)) if signed else 0


def test_every_format_is_tried() -> None:
    """Here, but for those whose levels a weight decides, which have tests of their own beside this file."""
    known = {kind for kind in Format.kinds().values() if kind.__module__.startswith("kurtail_pl.")}
    assert {type(weights) for weights in FORMATS} | {Mixed, Skim} == known


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_values_are_the_nearest_of_all_levels(weights: Format) -> None:
    weight = weight_of()
    quantized = weights.nearest(weight)
    assert quantized.codes.dtype == weights.code_dtype
    low, high = weights.code_range
    assert (low, high) == (first_code(weights), first_code(weights) + len(steps_of(weights)) - 1)
    assert quantized.codes.min() >= low
    assert quantized.codes.max() <= high
    levels, values = levels_of(weights, quantized.grid, COLUMNS), weights.values(quantized)
    chosen = (quantized.codes.long() - low)[..., None]
    assert values.dtype == quantized.grid.scale.dtype
    torch.testing.assert_close(values.double(), levels.gather(-1, chosen)[..., 0], rtol=1e-6, atol=1e-9)
    exact = weight.double()
    error, least = (values.double() - exact).abs(), (levels - exact[..., None]).abs().amin(-1)
    step = quantized.grid.scale.double().repeat_interleave(COLUMNS // quantized.grid.scale.shape[1], 1)
    assert ((error - least) <= 1e-4 * step).all()
    _, again = (t.flatten(-2) for t in weights.on_grid(
        weight.view(*quantized.grid.scale.shape, -1), *(None if t is None else t[..., None] for t in quantized.grid)
    ))  # fmt: skip
    assert torch.equal(again, values)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 2 * COLUMNS])
def test_what_is_stored_is_read_again(weights: Format, columns: int) -> None:
    quantized = weights.nearest(weight_of(columns=columns))
    stored = weights.pack(quantized)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == dict(weights.buffers(ROWS, columns))
    found = weights.unpack({name: tensor.clone() for name, tensor in stored.items()}, columns)
    assert torch.equal(found.codes, quantized.codes)
    assert found.codes.dtype == quantized.codes.dtype
    assert torch.equal(found.grid.scale, quantized.grid.scale)
    assert (found.grid.zero_point is None) == (quantized.grid.zero_point is None)
    assert torch.equal(weights.values(found), weights.values(quantized))


@pytest.mark.parametrize("weights", [w for w in FORMATS if w.group_size is None], ids=str)
def test_an_odd_width_takes_a_byte_for_each_code(weights: Format) -> None:
    quantized = weights.nearest(weight_of(columns=43))
    stored = weights.pack(quantized)
    assert stored["codes"].shape == (ROWS, 43)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == dict(weights.buffers(ROWS, 43))
    assert torch.equal(weights.unpack(stored, 43).codes, quantized.codes)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_every_code_travels(weights: Format) -> None:
    """All codes, whatever a weight makes of them."""
    low, high = weights.code_range
    codes = (torch.arange(ROWS * COLUMNS) % (high + 1 - low) + low).view(ROWS, COLUMNS).to(weights.code_dtype)
    quantized = weights.nearest(weight_of())._replace(codes=codes)
    found = weights.unpack(weights.pack(quantized), COLUMNS)
    assert torch.equal(found.codes, codes)
    levels = levels_of(weights, quantized.grid, COLUMNS).gather(-1, (codes.long() - low)[..., None])[..., 0]
    torch.testing.assert_close(weights.values(found).double(), levels, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_zeros_stay_zeros(weights: Format) -> None:
    """A row of them, and a group in a row of others."""
    weight = weight_of()
    weight[1] = 0
    weight[2, 32:64] = 0
    found = weights.unpack(weights.pack(weights.nearest(weight)), COLUMNS)
    values = weights.values(found)
    assert values.isfinite().all()
    assert not values[1].any()
    if weights.group_size is not None:
        assert not values[2, 32:64].any()
    whole = weights.nearest(torch.zeros(2, COLUMNS))
    assert not weights.values(weights.unpack(weights.pack(whole), COLUMNS)).any()


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_half_precision_loses_no_more_than_its_own_digits(weights: Format) -> None:
    weight = weight_of()
    half = weights.nearest(weight.bfloat16())
    exact = weights.nearest(weight.bfloat16().float())
    assert half.grid.scale.dtype == torch.float32
    torch.testing.assert_close(weights.values(half), weights.values(exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_plain_data_and_back(weights: Format) -> None:
    assert Format.from_dict(weights.to_dict()) == weights
    assert Method.from_dict(weights.to_dict()) == weights


@pytest.mark.parametrize(
    "weights",
    [Uniform(group_size=16), Normal(group_size=16), FloatZero(group_size=16), MXFP4(), Progressive(16), NVFP4()],
)
def test_groups_that_fill_no_width_are_refused(weights: Format) -> None:
    weights.require("weights", (64, 128))
    size = weights.group_size
    with pytest.raises(
        ConfigError,
        match=f"weights.group_size is {size} and this model has 172 .* divisor of 4, which divides 64 and 172",
    ):
        weights.require("weights", (64, 172))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_of_normal_numbers_is_the_one_that_is_said(bits: int) -> None:
    x = torch.randn(64, 8192, generator=torch.Generator().manual_seed(bits))
    weights = Normal(bits)
    found = (weights.values(weights.nearest(x)) - x).square().mean() / x.square().mean()
    assert weights.relative_error() == pytest.approx(found.item(), rel=0.02)
    assert Uniform(bits).relative_error() is None


def bits_of(x: float) -> tuple[float, int]:
    """Mantissa in [1, 2) and exponent."""
    mantissa, exponent = torch.frexp(torch.tensor(x, dtype=torch.float64))
    return 2 * mantissa.item(), int(exponent) - 1


def test_scales_of_mxfp4_are_powers_of_two() -> None:
    scale = MXFP4().grid(weight_of()).scale
    assert {bits_of(s)[0] for s in scale.flatten().tolist()} == {1.0}
    stored = MXFP4().pack(MXFP4().nearest(weight_of()))["scale"]
    assert torch.equal(2.0 ** (stored.double() - 127), scale.double())


def test_scales_of_nvfp4_have_three_bits_after_the_point() -> None:
    """E4M3 times one power of two: four significant bits, and at most 448 in E4M3."""
    stored = NVFP4().pack(NVFP4().nearest(weight_of()))
    whole, scale = stored["tensor_scale"].item(), NVFP4().grid(weight_of()).scale.double()
    assert bits_of(whole)[0] == 1.0
    for s in scale.flatten().tolist():
        mantissa, exponent = bits_of(s / whole)
        assert mantissa * 8 == int(mantissa * 8) or exponent < -6
        assert 2.0**-9 <= s / whole <= 448
    assert 224 <= scale.max() / whole <= 448


def test_blocks_of_sizes_far_apart_are_read_again() -> None:
    """Of NVFP4: the smallest scales are then subnormal in E4M3."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        sizes = torch.logspace(-6, 0, 12).repeat_interleave(16) * (1 + torch.rand(192, generator=draw))
        weight = torch.randn(4, 192, generator=draw) * sizes
        quantized = NVFP4().nearest(weight)
        found = NVFP4().unpack(NVFP4().pack(quantized), 192)
        assert torch.equal(found.grid.scale, quantized.grid.scale)


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_ties_go_to_the_even_mantissa(weights: Format) -> None:
    """As IEEE 754 rounds: 0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4."""
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    for sign in (1, -1):
        _, values = weights.on_grid(sign * x, torch.ones(1), None)
        assert values.tolist() == [sign * v if v else 0.0 for v in (0, 1, 1, 2, 2, 4, 4, 6)]


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_no_other_scale_of_those_that_are_tried_has_less_error(weights: MXFP4 | NVFP4) -> None:
    weight = weight_of()
    groups = weight.view(ROWS, -1, weights.group_size)

    def error(scale: Tensor) -> Tensor:
        levels = levels_of(weights, Grid(scale, None), COLUMNS)
        return ((levels - weight[..., None].double()).abs().amin(-1) ** 2.4).view(groups.shape).sum(-1)

    found = error(weights.grid(weight).scale)
    for ratio in weights.ratios:
        tried = error(weights.project(groups.abs().amax(-1) / 6 * ratio))
        assert (found <= tried * (1 + 1e-4) + 1e-9).all()


def test_a_zero_point_that_is_any_number() -> None:
    """Levels lie between those of an integer one."""
    weights = FloatZero(2, group_size=4)
    grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1.3]]))
    codes, values = weights.on_grid(torch.tensor([-2.0, -0.62, 0.0, 0.12, 9.0]), *(t[0] for t in grid))  # type: ignore[union-attr]
    assert codes.tolist() == [0, 0, 1, 2, 3]
    torch.testing.assert_close(values, (codes - 1.3) * 0.5)
    quantized = Quantized(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), grid)
    found = weights.unpack(weights.pack(quantized), 4)
    assert found.grid.zero_point is not None
    assert found.grid.zero_point.item() == pytest.approx(1.3)
    with pytest.raises(ConfigError, match=r"weights\.symmetric is true"):
        replace(weights, symmetric=True)
