"""Weights on two levels of scales: in int8 whatever is asked for, and the same by integers as by floats."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantized
from kurtail_pl.methods import GPTQ, RTN, Moments, Progressive, Rounder


def weight(rows: int = 6, columns: int = 96, seed: int = 0) -> Tensor:
    """Heavy tails, so that groups of a row have ranges far apart."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.02


def stored_steps(weights: Progressive, quantized: Quantized, columns: int) -> np.ndarray:
    """``(code - zero point) group_scale`` of what is stored, in Python's own integers."""
    stored = weights.pack(quantized)
    codes, size = weights.unpacked(stored["codes"], columns).numpy().astype(object), weights.group_size or columns
    group, zero = (np.repeat(stored[n].numpy().astype(object), size, 1) for n in ("group_scale", "zero_point"))
    return (codes - zero) * group


def ends(weights: Progressive, grid: Grid, size: int) -> np.ndarray:
    """Steps of the first and the last code of every group, side by side."""
    rows, groups = grid.scale.shape
    codes = torch.tensor([0, 15]).repeat_interleave(size // 2).repeat(rows, groups).to(torch.uint8)
    return stored_steps(weights, Quantized(codes, grid), groups * size)


def test_no_range_of_integers_leaves_int8() -> None:
    """All (smallest, largest) of a group in rows that reach to +-119: QServe's rounding makes 130 of some of them."""
    pairs = torch.tensor([(low, high) for low in range(-119, 1) for high in range(120) if high > low]).float()
    assert len(pairs) == 14399
    # As QServe rounds: an integer scale and a zero point of the range alone.
    scale = ((pairs[:, 1] - pairs[:, 0]) / 15).round().clamp(min=1)
    zero = (-pairs[:, 0] / scale).round().clamp(0, 15)
    assert ((15 - zero) * scale).max() > 127
    grid = Progressive(2).storable(Grid(scale[:, None], zero[:, None]))
    assert np.abs(ends(Progressive(2), grid, 2)).max() <= 127
    # Beside a group that reaches to the row's end.
    whole = Grid(
        torch.stack([scale, torch.full_like(scale, 17.0)], 1), torch.stack([zero, torch.full_like(zero, 7)], 1)
    )
    assert np.abs(ends(Progressive(2), Progressive(2).storable(whole), 2)).max() <= 127
    found = Progressive(2).nearest(pairs)
    assert np.abs(ends(Progressive(2), found.grid, 2)).max() <= 127


@pytest.mark.parametrize("zero", range(16))
def test_no_scale_leaves_int8_beside_any_other(zero: int) -> None:
    """Ratios of two groups of a row in steps of a thousandth, the zero point of the other at either end or inside."""
    ratio = torch.arange(1, 2001) / 1000
    for other in (0, 4, 7, 8, 15):
        scale = torch.stack([ratio, torch.ones_like(ratio)], 1) * 0.0173
        grid = Progressive(2).storable(Grid(scale, torch.tensor([float(zero), float(other)]).expand(2000, 2)))
        assert np.abs(ends(Progressive(2), grid, 2)).max() <= 127
        assert torch.equal(Progressive(2).storable(grid).scale, grid.scale)
        # A row's step is at most 1/120 of the furthest reach and a bfloat16's last bit; half of it is lost, or a scale
        # that is smaller becomes a whole one.
        reach = scale * torch.tensor([max(zero, 15 - zero), max(other, 15 - other)])
        step = reach.amax(1, keepdim=True) / 120 * (1 + 2**-7)
        assert ((grid.scale - scale).abs() <= torch.maximum(step / 2, step - scale) * (1 + 1e-6)).all()


def test_a_grid_that_is_whole_but_reaches_too_far_is_projected() -> None:
    grid = Grid(torch.tensor([[15.0, 1.0]]), torch.zeros(1, 2))
    found = Progressive(2).storable(grid)
    assert np.abs(ends(Progressive(2), found, 2)).max() <= 127
    assert found.scale[0, 0] == pytest.approx(15, rel=0.01)


@pytest.mark.parametrize("rounder", [RTN(), GPTQ(), GPTQ(refine=2), GPTQ(correction="foem")], ids=str)
@pytest.mark.parametrize("group_size", [None, 16])
def test_products_in_integers_are_those_of_floats(rounder: Rounder, group_size: int | None) -> None:
    """int8 times int8 in int32, and two floats at the end, against exact fractions of the simulated values."""
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(400, 96, generator=draw) @ torch.randn(96, 96, generator=draw)
    weights, x = Progressive(group_size), torch.randint(-127, 128, (3, 96), generator=draw)
    quantized = rounder.codes(weight(), weights, Moments((inputs.T @ inputs).double(), None))
    steps = stored_steps(weights, quantized, 96)
    assert np.abs(steps).max() <= 127
    sums = x.numpy().astype(np.int8).astype(np.int32) @ steps.astype(np.int8).astype(np.int32).T
    row = weights.pack(quantized)["row_scale"].double().flatten().tolist()
    values = weights.values(quantized).double().tolist()
    for token in range(3):
        for output in range(6):
            exact = sum(Fraction(v) * int(c) for v, c in zip(values[output], x[token].tolist(), strict=True))
            assert exact == Fraction(row[output]) * int(sums[token, output])


def test_the_simulated_form_is_the_integer_form() -> None:
    quantized = Progressive(16).nearest(weight())
    row = Progressive(16).pack(quantized)["row_scale"].float()
    by_integers = torch.from_numpy(stored_steps(Progressive(16), quantized, 96).astype(np.float32)) * row
    assert torch.equal(Progressive(16).values(quantized), by_integers)


def test_of_the_integers_the_one_with_the_least_error_is_taken() -> None:
    """Against all of them, with the row's scale and the zero points as they are."""
    x, weights = weight(), Progressive(16)
    grid = weights.grid(x)
    assert grid.zero_point is not None
    row = weights.pack(weights.nearest(x))["row_scale"].double()
    groups, zero = x.double().view(6, 6, 16), grid.zero_point.double()

    def error(scale: Tensor) -> Tensor:
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
        return (((codes - zero[..., None]) * scale[..., None] - groups).abs() ** 2.4).sum(-1)

    found = error(grid.scale.double())
    for integer in range(1, 16):
        scale = (integer * row).expand(6, 6)
        inside = integer * torch.maximum(zero, 15 - zero) <= 127
        assert (found <= error(scale).where(inside, torch.inf) * (1 + 1e-4)).all()


def test_what_it_takes() -> None:
    """Four bits, two bytes for each group, two for each row."""
    buffers = Progressive(128).buffers(16, 1024)
    size = 8 * sum(np.prod(b.shape) * b.dtype.itemsize for b in buffers.values())
    assert size / (16 * 1024) == 4 + 16 / 128 + 16 / 1024


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_weights_of_any_size(size: float) -> None:
    x = weight().double() * size
    lost = (Progressive(16).values(Progressive(16).nearest(x.float())).double() - x).square().sum()
    assert lost < 0.03 * x.square().sum()
