"""Quantizers against a float64 search for the nearest of all grid values, with limits from torch.quantile."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip, LearnedClip, upper_quantile
from kurtail_pl.maths.quantizers import (
    Grid,
    Quantizer,
    dequantize,
    fake_quantize,
    quantize,
    require_groups,
    rounded,
    split_groups,
)

CLIPS = [Clip(), Clip(amount=0.9), Clip("quantile", 0.98), Clip("quantile", 0.5), Clip("quantile", 1.0)]


def values(*shape: int, seed: int = 0) -> Tensor:
    """Heavy-tailed float64 values, off centre, with a scale of its own for each row."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random, dtype=torch.float64) ** 3 + 0.5
    return x * (1 + 10 * torch.rand(*shape[:-1], 1, generator=random, dtype=torch.float64))


def limits(group: Tensor, quantizer: Quantizer) -> tuple[float, float]:
    kind, r = quantizer.clip.kind, quantizer.clip.amount
    if quantizer.symmetric:
        high = r * group.abs().max() if kind == "ratio" else torch.quantile(group.abs(), r)
        return -float(high), float(high)
    if kind == "ratio":
        low, high = r * group.min(), r * group.max()
    else:
        low, high = torch.quantile(group, 1 - r), torch.quantile(group, r)
    return min(float(low), 0.0), max(float(high), 0.0)


def nearest(group: Tensor, quantizer: Quantizer) -> tuple[list[int], Tensor, float, int]:
    """Codes, values, scale and zero point of one group ``[n]``, by trying every code."""
    low, high = limits(group, quantizer)
    bits = quantizer.bits
    scale = high / (2 ** (bits - 1) - 1) if quantizer.symmetric else (high - low) / (2**bits - 1)
    scale = scale or 1.0
    zero = 0 if quantizer.symmetric else round(-low / scale)
    first = -(2 ** (bits - 1)) if quantizer.symmetric else 0
    codes = torch.arange(first, first + 2**bits)
    grid = (codes - zero).double() * scale
    best = (group[:, None] - grid).abs().argmin(-1)
    return codes[best].tolist(), grid[best], scale, zero


def check_against_search(x: Tensor, quantizer: Quantizer) -> None:
    codes, (scale, zero) = quantize(x, quantizer)
    group_size = quantizer.group_size or x.shape[-1]
    groups = x.shape[-1] // group_size
    assert codes.shape == x.shape
    assert codes.dtype == (torch.int8 if quantizer.symmetric else torch.uint8)
    assert scale.shape == (*x.shape[:-1], groups)
    assert (zero is None) == quantizer.symmetric
    result = fake_quantize(x, quantizer).reshape(-1, group_size)
    rows = zip(x.reshape(-1, group_size), codes.reshape(-1, group_size), scale.flatten(), strict=True)
    zeros = [0] * scale.numel() if zero is None else zero.flatten().tolist()
    for i, (row, row_codes, row_scale) in enumerate(rows):
        expected_codes, expected_values, expected_scale, expected_zero = nearest(row, quantizer)
        assert row_scale.item() == pytest.approx(expected_scale, rel=1e-12)
        assert zeros[i] == expected_zero
        assert row_codes.tolist() == expected_codes
        torch.testing.assert_close(result[i], expected_values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_each_value_goes_to_the_nearest_of_all_codes(bits: int, symmetric: bool, clip: Clip) -> None:
    check_against_search(values(6, 51), Quantizer(bits, symmetric, clip))


@pytest.mark.parametrize("clip", [Clip(amount=0.95), Clip("quantile", 0.9)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((3, 64), 16), ((3, 64), 1), ((3, 64), 64), ((2, 3, 4, 8), None), ((2, 5, 3 * 8), 8), ((12,), 4), ((0, 8), 4)],
    ids=["groups", "single", "whole", "heads", "heads side by side", "vector", "no tokens"],
)
def test_groups_and_heads_have_their_own_grid(
    shape: tuple[int, ...], group_size: int | None, symmetric: bool, clip: Clip
) -> None:
    check_against_search(values(*shape), Quantizer(4, symmetric, clip, group_size))


def test_default_is_symmetric_int4_per_token() -> None:
    x = values(4, 32)
    codes, (scale, zero) = quantize(x, Quantizer())
    assert zero is None
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 7)
    assert set(codes.abs().amax(-1).tolist()) == {7}


@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_round_half_to_even(symmetric: bool) -> None:
    # Largest 7 and, asymmetric, smallest -8: the scale is exactly 1 and the zero point 8.
    x = torch.tensor([7.0, -8.0 if not symmetric else -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])
    expected = torch.tensor([7.0, x[1].item(), 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 4.0])
    assert torch.equal(fake_quantize(x, Quantizer(4, symmetric)), expected)


def test_odd_zero_point_rounds_ties_of_the_value_to_even() -> None:
    x = torch.tensor([-3.0, 12.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    codes, (scale, zero) = quantize(x, Quantizer(4, symmetric=False))
    assert zero is not None
    assert (scale.item(), zero.item()) == (1, 3)
    assert codes.tolist() == [0, 15, 3, 5, 5, 3, 1]


def test_clipped_values_saturate_at_the_ends() -> None:
    x = torch.tensor([-100.0, 100.0, *torch.linspace(-1, 1, 98).tolist()]).double()
    codes, _ = quantize(x, Quantizer(4, clip=Clip("quantile", 0.9)))
    assert codes[:2].tolist() == [-8, 7]
    codes, (_, zero) = quantize(x + 0.5, Quantizer(4, symmetric=False, clip=Clip("quantile", 0.9)))
    assert codes[:2].tolist() == [0, 15]
    assert zero is not None
    assert 0 < zero.item() < 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_form_is_the_dequantized_integer_form(bits: int, symmetric: bool, clip: Clip, dtype: torch.dtype) -> None:
    x = values(40, 64).to(dtype)
    quantizer = Quantizer(bits, symmetric, clip, group_size=32)
    fake = fake_quantize(x, quantizer)
    assert fake.dtype == dtype
    assert torch.equal(fake, dequantize(quantize(x, quantizer)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float32_error_is_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    x = values(50, 64).float()
    codes, (scale, _) = quantize(x, Quantizer(bits, symmetric))
    error = (fake_quantize(x, Quantizer(bits, symmetric)) - x).abs().double()
    # The zero point is rounded, so one end may lie up to half a step outside an asymmetric grid.
    steps = 0.5 if symmetric else 1.0
    assert (error <= steps * scale * (1 + 1e-5)).all()
    # The largest magnitude gets the last code; an asymmetric row spans all codes, give or take the rounded zero point.
    if symmetric:
        assert set(codes.int().abs().amax(-1).tolist()) == {2 ** (bits - 1) - 1}
    else:
        assert (codes.int().amax(-1) - codes.int().amin(-1)).min().item() >= 2**bits - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_twice_changes_no_code(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    quantizer = Quantizer(bits, symmetric, Clip())
    # Both ends of an asymmetric grid must be hit for its limits to come back. Here low : high = -1 : 2, which puts the
    # zero point at a third of 3, 15 or 255: a whole number before it is rounded.
    x = values(50, 64).to(dtype)
    x[:, 0], x[:, 1] = -x.abs().amax(-1), x.abs().amax(-1) * 2
    once = quantize(x, quantizer)
    twice = quantize(dequantize(once), quantizer)
    assert torch.equal(once.codes, twice.codes)
    torch.testing.assert_close(dequantize(once), dequantize(twice), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("clip", [Clip(), Clip("quantile", 0.98)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_stay_zero(symmetric: bool, clip: Clip, dtype: torch.dtype) -> None:
    x = values(3, 16).to(dtype)
    x[1] = 0
    quantizer = Quantizer(4, symmetric, clip)
    codes, (scale, zero) = quantize(x, quantizer)
    assert scale[1].item() == 1
    assert not codes[1].any()
    assert zero is None or zero[1].item() == 0
    result = fake_quantize(x, quantizer)
    assert result.isfinite().all()
    assert not result[1].any()
    assert result[0].any()


@pytest.mark.parametrize("clip", [Clip(), Clip("quantile", 0.9)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("constant", [0.3, -0.3, 1e-20, 1e20])
def test_constant_rows_come_back(constant: float, symmetric: bool, clip: Clip) -> None:
    x = torch.full((2, 16), constant)
    torch.testing.assert_close(fake_quantize(x, Quantizer(4, symmetric, clip)), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_rows_keep_zero_on_the_grid(sign: int) -> None:
    x = sign * torch.linspace(3.2, 18, 38)
    codes, (scale, zero) = quantize(x, Quantizer(4, symmetric=False))
    assert zero is not None
    assert scale.item() == pytest.approx(18 / 15)
    assert zero.item() == (0 if sign > 0 else 15)
    assert codes.tolist() == [zero.item() + sign * round(v / 1.2) for v in x.abs().double().tolist()]


@pytest.mark.parametrize(
    "quantizer", [Quantizer(4), Quantizer(3, False), Quantizer(8, False, Clip(amount=0.5))], ids=str
)
def test_a_given_grid_serves_all_rows(quantizer: Quantizer) -> None:
    """Nearest of all values of the one grid, whatever the rows hold; the clip is the grid's own matter."""
    x, zero = values(4, 5, 12), 0 if quantizer.symmetric else 3
    grid = Grid(torch.tensor([0.7], dtype=torch.float64), None if quantizer.symmetric else torch.tensor([3.0]).double())
    low, high = quantizer.code_range
    levels = (torch.arange(low, high + 1) - zero).double() * 0.7
    best = (x[..., None] - levels).abs().argmin(-1)
    quantized = quantize(x, quantizer, grid)
    assert torch.equal(quantized.codes.long(), best + low)
    assert torch.equal(fake_quantize(x, quantizer, grid), dequantize(quantized))
    torch.testing.assert_close(dequantize(quantized), levels[best], rtol=1e-14, atol=0)


@pytest.mark.parametrize("q", [0.02, 0.29, 0.5, 0.9, 0.98, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 51, 576])
def test_upper_quantile_equals_torch(q: float, n: int) -> None:
    x = values(5, n)
    torch.testing.assert_close(upper_quantile(x, q), torch.quantile(x, q, dim=-1), rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone() -> None:
    for symmetric in (True, False):
        x = values(4, 16).float()
        before = x.clone()
        for quantizer in (Quantizer(4, symmetric), Quantizer(4, symmetric, Clip("quantile", 0.9), 1)):
            quantized = quantize(x, quantizer)
            codes = quantized.codes.clone()
            dequantize(quantized)
            fake_quantize(x, quantizer)
            assert torch.equal(x, before)
            assert torch.equal(quantized.codes, codes)


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(2, True, (-2, 1)), (4, True, (-8, 7)), (4, False, (0, 15)), (8, False, (0, 255))],
)
def test_code_range(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert Quantizer(bits, symmetric).code_range == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("bits", bits) for bits in (-4, 0, 1, 9, 16)),
        *(("group_size", size) for size in (0, -16)),
    ],
)
def test_settings_out_of_range_raise(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is '?{value}'?;"):
        Quantizer(**{field: value})


@pytest.mark.parametrize("kind", ["ratio", "quantile"])
@pytest.mark.parametrize("amount", [1.5, 1.01, 0, -0.5, math.nan, math.inf])
def test_amounts_out_of_range_raise(kind: Any, amount: float) -> None:
    with pytest.raises(ValueError, match=rf"^clip.amount is {amount}; give a number in \(0, 1\]"):
        Clip(kind, amount)


@pytest.mark.parametrize("kind", ["foo", "", "ratio:0.9", None])
def test_other_kinds_raise(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^clip.kind is {kind!r}; write ratio or quantile"):
        Clip(kind)


@pytest.mark.parametrize("group_size", [5, 24, 128])
def test_group_that_does_not_divide_raises(group_size: int) -> None:
    x = torch.ones(2, 64)
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=rf"group_size {group_size} does not divide the 64 channels"):
            function(x, Quantizer(group_size=group_size))


def test_split_groups_keeps_runs_of_channels() -> None:
    assert split_groups(torch.arange(12).reshape(2, 6), 3).tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
    ]
    assert split_groups(torch.zeros(2, 6), None).shape == (2, 1, 6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_clip_quantizes_as_the_same_ratio_does(symmetric: bool) -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    ratio = torch.tensor(0.7)
    fixed = fake_quantize(x, Quantizer(4, symmetric, Clip(amount=ratio.item()), 8))
    assert torch.equal(fake_quantize(x, Quantizer(4, symmetric, LearnedClip(amount=ratio), 8)), fixed)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clip_learns_from_rounding_errors_and_from_what_is_clipped(symmetric: bool) -> None:
    """3 bits, limits at half of -10 and 6, by hand: a step for each value is its error, or its code where clipped.

    Symmetric: 10 / 2 is code 3, so that steps are 5/3. Asymmetric: -5 to 3 in 7 steps of 8/7, zero at code 4.4: 4.
    """
    x, ratio = torch.tensor([-10.0, -5.0, 0.2, 1.0, 6.0]), torch.tensor(0.5, requires_grad=True)
    step = 5 / 3 if symmetric else 8 / 7
    codes = [-4, -3, 0, 1, 3] if symmetric else [-4, -4, 0, 1, 3]
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    (fake_quantize(x, Quantizer(3, symmetric, LearnedClip(amount=ratio))) * weight).sum().backward()
    inside = [abs(code * step - value) <= step / 2 for code, value in zip(codes, x.tolist(), strict=True)]
    assert inside == [False, True, True, True, False]
    slopes = [
        code - value / step if kept else code for code, value, kept in zip(codes, x.tolist(), inside, strict=True)
    ]
    # The step is proportional to the ratio.
    expected = sum(w * slope * step / 0.5 for w, slope in zip(weight.tolist(), slopes, strict=True))
    assert ratio.grad is not None
    assert ratio.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_pass_straight_through(symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 8, generator=draw, requires_grad=True), torch.randn(5, 8, generator=draw)
    (fake_quantize(x, Quantizer(4, symmetric=symmetric, clip=Clip(amount=0.5), group_size=4)) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


def test_halves_in_float64_go_to_even_whatever_was_lost_before() -> None:
    halves = torch.arange(-6.5, 7, dtype=torch.float64)
    even = torch.tensor([-6.0, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6], dtype=torch.float64)
    for noise in (-1e-12, 0, 1e-12):
        assert torch.equal(rounded(halves + noise), even)
    beside = torch.tensor([1e-9, -1e-9], dtype=torch.float64)
    assert rounded(2.5 + beside).tolist() == [3, 2]
    assert rounded(3.5 + beside).tolist() == [4, 3]


@pytest.mark.parametrize(
    ("widths", "advice"),
    [
        ((64, 64, 172), "choose a divisor of 4, which divides 64 and 172, or null"),
        ((64,), "choose a divisor of 64, or null"),
    ],
)
def test_groups_that_divide_no_width_are_refused_with_those_that_do(widths: tuple[int, ...], advice: str) -> None:
    with pytest.raises(ConfigError, match=f"^x.group_size is 48 and this model has 64 channels to divide; {advice}$"):
        require_groups("x", 48, widths)
