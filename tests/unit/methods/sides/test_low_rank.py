"""The side of low rank: what is stored, float16's range, rounds against a loop in numpy, and refusals."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import LARGEST_LOSS
from kurtail_pl.methods import LowRank, Moments, Needs
from kurtail_pl.methods.format import Tensors

NONE = Moments(None, None)


def weight_of(rows: int = 24, columns: int = 16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def nothing(rest: Tensor) -> Tensor:
    return torch.zeros_like(rest)


def coarse(rest: Tensor) -> Tensor:
    """What rounding to multiples of a seventh of each row's largest number takes."""
    step = rest.abs().amax(1, keepdim=True) / 7
    return rest - (rest / step).round() * step


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_what_is_stored() -> None:
    side = LowRank(3, weighted=False)
    tensors = side.fitted(weight_of(), NONE, nothing)
    buffers = side.buffers(24, 16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == dict(buffers)
    assert [buffer.dtype for buffer in buffers.values()] == [torch.float16] * 2
    up, down = tensors["up"].double().numpy(), tensors["down"].double().numpy()
    assert np.array_equal(side.dense(tensors, 16).numpy(), up @ down)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    np.testing.assert_allclose(side.product(x, tensors).numpy(), x.numpy() @ (up @ down).T, rtol=1e-12, atol=1e-12)
    assert side.product(x.float(), tensors).dtype == torch.float32


@pytest.mark.parametrize("size", [1e9, 1e4, 1e-4, 1e-9])
def test_the_range_of_float16_is_that_of_the_square_root(size: float) -> None:
    """A weight of a billion has factors of tens of thousands."""
    side, weight = LowRank(16, weighted=False), weight_of() * size
    tensors = side.fitted(weight, NONE, nothing)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert relative(side.dense(tensors, weight.shape[1]), weight.double()) < 2 * LARGEST_LOSS


def test_what_float16_does_not_hold_is_float32() -> None:
    side, weight = LowRank(16, weighted=False), weight_of() * 1e12
    tensors = side.fitted(weight, NONE, nothing)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert relative(side.dense(tensors, weight.shape[1]), weight.double()) < 2 * LARGEST_LOSS


def test_rounds_are_numpys() -> None:
    """Each side is the best for what the rounded rest before it leaves; the first that is no better is not taken."""
    weight = weight_of().double().numpy()
    wanted, errors = weight, [np.inf]
    while True:
        u, s, v = np.linalg.svd(wanted, full_matrices=False)
        side = (u[:, :4] * s[:4]) @ v[:4]
        lost = coarse(torch.from_numpy(weight - side)).numpy()
        if (lost**2).sum() >= errors[-1]:
            break
        errors.append(float((lost**2).sum()))
        best, wanted = side, side + lost
    assert len(errors) > 3
    found = LowRank(4, rounds=50, weighted=False)
    tensors = found.fitted(weight_of(), NONE, coarse)
    # Float16 keeps eleven bits of each factor.
    assert relative(found.dense(tensors, weight.shape[1]), torch.from_numpy(best)) < 0.02
    left = coarse(torch.from_numpy(weight) - found.dense(tensors, weight.shape[1]))
    assert float(left.square().sum()) < (errors[-1] + errors[1]) / 2


def counted(errors: list[float]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Rounding that takes given amounts, and the rests that it was given."""
    rests: list[Tensor] = []

    def lost(rest: Tensor) -> Tensor:
        rests.append(rest)
        return torch.full_like(rest, errors[len(rests) - 1])

    return lost, rests


@pytest.mark.parametrize(
    ("errors", "asked", "taken"),
    [([3.0, 2.0, 2.5, 1.0], 3, 1), ([3.0, 3.0], 2, 0), ([4.0, 3.0, 2.0, 1.0], 4, 3)],
    ids=["worse", "no better", "all better"],
)
def test_the_first_that_is_no_better_is_the_last(errors: list[float], asked: int, taken: int) -> None:
    lost, rests = counted(errors)
    side, weight = LowRank(2, rounds=4, weighted=False), weight_of()
    tensors = side.fitted(weight, NONE, lost)
    assert len(rests) == asked
    assert torch.equal(weight.double() - side.dense(tensors, weight.shape[1]), rests[taken])


def test_one_round_rounds_nothing() -> None:
    lost, rests = counted([])
    tensors = LowRank(2, weighted=False).fitted(weight_of(), NONE, lost)
    assert (len(rests), len(tensors)) == (0, 2)


def everything(rest: Tensor) -> Tensor:
    """Rounding to zero: the second side is then the nearest to the weight, as errors are weighted."""
    return rest


def test_inputs_that_are_large_are_approximated_better() -> None:
    scale = torch.logspace(-1, 1, 16, dtype=torch.float64)
    moments, weight = Moments(torch.diag(scale**2), None), weight_of()
    kinds = {w: LowRank(4, rounds=2, weighted=w) for w in (False, True)}
    sides: dict[bool, Tensors] = {w: side.fitted(weight, moments, everything) for w, side in kinds.items()}
    errors = {w: weight.double() - LowRank(4).dense(tensors, weight.shape[1]) for w, tensors in sides.items()}
    assert (errors[True] * scale).norm() < 0.9 * (errors[False] * scale).norm()
    assert errors[True].norm() > errors[False].norm()


def test_needs_settings_and_sentence() -> None:
    assert LowRank(rounds=2).needs == Needs.INPUTS
    assert LowRank().needs == LowRank(rounds=2, weighted=False).needs == Needs.NOTHING
    assert "rank 8 in 16 bits" in LowRank(8).sentence()
    LowRank(48).require((48, 96))
    with pytest.raises(ConfigError, match=r"side\.rank is 49 and the narrowest linears of this model read 48 channels"):
        LowRank(49).require((96, 48))
    for settings in ({"rank": 0}, {"rounds": 0}, {"rank": 2.5}, {"weighted": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} is {next(iter(settings.values()))}"):
            LowRank(**settings)  # type: ignore[arg-type]
