"""Groups of columns in 2 and 4 bits: which are wide against all choices, every value against float64, and storage."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.methods import GPTQ, RTN, Format, Mixed, Moments

ROWS, GROUPS, SIZE = 6, 8, 8
COLUMNS = GROUPS * SIZE


def weight_of(seed: int = 0, groups: int = GROUPS) -> Tensor:
    """Groups of sizes far apart, and another mean in each row."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.rand(groups, generator=draw).mul(3).exp().repeat_interleave(SIZE)
    return torch.randn(ROWS, groups * SIZE, generator=draw) * sizes + torch.linspace(-1, 1, ROWS)[:, None]


def hessian_of(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-1, 1, columns, dtype=torch.float64).flip(0)
    return x.T @ x


def wide_groups(codes: Tensor, size: int = SIZE) -> list[int]:
    return [g for g in range(codes.shape[1] // size) if codes[:, g * size : (g + 1) * size].max() > 3]


def best_error(group: np.ndarray, bits: int) -> np.ndarray:
    """Square error of each number on the range's grid with the least error of norm 2.4, of all 80; ``[out, size]``."""
    top, found = 2**bits - 1, []
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    for step in range(80):
        scale = ((high - low) * (1 - step / 100) / top)[:, None]
        zero = np.round(-low[:, None] * (1 - step / 100) / scale)
        values = (np.clip(np.round(group / scale) + zero, 0, top) - zero) * scale
        found.append(np.abs(values - group))
    best = np.argmin([(each**2.4).sum(1) for each in found], 0)
    return np.stack([found[b][row] ** 2 for row, b in enumerate(best)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by_inputs", [True, False])
def test_no_other_groups_would_lose_less(seed: int, by_inputs: bool) -> None:
    """Of all ways to give three of eight groups 4 bits."""
    weight, hessian = weight_of(seed), hessian_of(seed) if by_inputs else None
    own = Mixed(2.75, SIZE).fitted(weight, hessian)
    counts = np.ones(COLUMNS) if hessian is None else hessian.diagonal().numpy()
    errors = {bits: [] for bits in (2, 4)}
    for g in range(GROUPS):
        mine = slice(g * SIZE, (g + 1) * SIZE)
        for bits, found in errors.items():
            found.append(float((best_error(weight[:, mine].double().numpy(), bits) * counts[mine]).sum()))
    cost = {
        wide: sum(errors[4 if g in wide else 2][g] for g in range(GROUPS)) for wide in combinations(range(GROUPS), 3)
    }
    assert tuple(wide_groups(own.nearest(weight).codes)) == min(cost, key=cost.__getitem__)


@pytest.mark.parametrize("average", [2.0, 2.3, 3.0, 4.0])
def test_every_value_is_the_nearest_of_its_groups(average: float) -> None:
    """In float64: integers less a zero point, 0 to 3 or to 15, times an integer of eight bits, times a power of two."""
    weight, weights = weight_of(), Mixed(average, SIZE)
    stored = weights.pack(weights.nearest(weight))
    assert int((stored["widths"] == 4).sum()) == int((average - 2) * GROUPS / 2)
    scale = stored["group_scale"].double() * 2.0 ** (stored["row_exponent"].double() - 127)
    assert (stored["group_scale"].amax(1) >= 128).all()
    data = stored["zero_point"].int()
    zero = torch.cat([data % 16, data // 16], 1)
    found = weights.values(weights.unpack(stored, COLUMNS)).double()
    for g, bits in enumerate(stored["widths"].tolist()):
        steps = (torch.arange(2**bits) - zero[:, g : g + 1]) * scale[:, g : g + 1]
        mine = slice(g * SIZE, (g + 1) * SIZE)
        exact, values = weight[:, mine].double(), found[:, mine]
        least = (exact[..., None] - steps[:, None]).abs().amin(-1)
        assert ((values - exact).abs() <= least + 1e-5 * scale[:, g : g + 1]).all()


@pytest.mark.parametrize("weights", [Mixed(2.3, 8), Mixed(2.0, 8), Mixed(4.0, 16), Mixed(3.1, 4), Mixed(2.5, 64)])
@pytest.mark.parametrize("rounder", [RTN(), GPTQ()])
def test_what_is_stored_is_read_again(weights: Mixed, rounder: RTN | GPTQ) -> None:
    weight = weight_of()
    own = weights.fitted(weight, hessian_of())
    quantized = rounder.codes(weight, own, Moments(hessian_of(), None))
    stored = weights.pack(quantized)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == dict(weights.buffers(ROWS, COLUMNS))
    found = weights.unpack({name: tensor.clone() for name, tensor in stored.items()}, COLUMNS)
    assert torch.equal(found.codes, quantized.codes)
    assert torch.equal(found.grid.scale, quantized.grid.scale)
    assert torch.equal(weights.values(found), own.values(quantized))


def test_gptq_rounds_each_column_in_its_groups_bits() -> None:
    weight, hessian = weight_of(1), hessian_of(1)
    own = Mixed(2.5, SIZE).fitted(weight, hessian)
    quantized = GPTQ().codes(weight, own, Moments(hessian, None))
    assert set(wide_groups(quantized.codes)) <= set(wide_groups(own.nearest(weight).codes))
    assert len(wide_groups(quantized.codes)) == 2

    def lost(found: Quantized) -> float:
        error = own.values(found).double() - weight.double()
        return float(((error @ hessian) * error).sum())

    assert lost(quantized) < lost(own.nearest(weight))


def test_the_first_groups_of_a_byte_are_those_of_two_bits() -> None:
    """Two groups of four columns: the wide one stands behind the narrow one, whatever their order."""
    weight = torch.tensor([[0.0, 1, 2, 15, 0, 1, 2, 3], [15.0, 7, 8, 0, 3, 2, 1, 0]])
    stored = Mixed(3.0, 4).pack(Mixed(3.0, 4).nearest(weight))
    assert stored["widths"].tolist() == [4, 2]
    assert stored["codes"].tolist() == [[0b11100100, 0x20, 0xF1], [0b00011011, 0x8F, 0x07]]


def test_zeros_stay_zeros() -> None:
    """A row of them, and a group in a row of others."""
    weight, weights = weight_of(), Mixed(2.5, SIZE)
    weight[1] = 0
    weight[2, SIZE : 2 * SIZE] = 0
    values = weights.values(weights.unpack(weights.pack(weights.nearest(weight)), COLUMNS))
    assert not values[1].any()
    assert not values[2, SIZE : 2 * SIZE].any()
    assert values.isfinite().all()
    assert not weights.values(weights.nearest(torch.zeros(2, COLUMNS))).any()


def test_a_grid_that_is_stored_stays_as_it_is() -> None:
    weights = Mixed(2.5, SIZE)
    grid = weights.grid(weight_of())
    assert torch.equal(weights.storable(grid).scale, grid.scale)


def test_plain_data_and_back() -> None:
    weights = Mixed(2.4, 16)
    assert Format.from_dict(weights.to_dict()) == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average": 1.9}, "weights.average is 1.9; .* give 2 to 4"),
        ({"average": 4.1}, "weights.average is 4.1"),
        ({"group_size": 6}, "weights.group_size is 6; give a multiple of 4"),
        ({"group_size": 0}, "weights.group_size is 0"),
    ],
)
def test_refusals(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixed(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weights.group_size is 32 and this model has 172"):
        Mixed().require("weights", (64, 172))
    with pytest.raises(ConfigError, match="refine is 2"):
        GPTQ(refine=2).require(Mixed())
