"""Scales for float16 against numpy's own float16 and brute force."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.half_grid import half_grid
from kurtail_pl.maths.quantizers import Grid


def scales(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of all sizes, below float16's normal numbers too."""
    draw = torch.Generator().manual_seed(0)
    return torch.exp2(torch.empty(4000, dtype=dtype).uniform_(-26, 12, generator=draw)).reshape(40, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_zero_points_they_are_the_nearest_of_float16(dtype: torch.dtype) -> None:
    scale = scales(dtype)
    expected = np.maximum(scale.numpy().astype(np.float16), np.float16(2**-24))
    assert np.array_equal(half_grid(Grid(scale, None)).scale.numpy(), expected.astype(scale.numpy().dtype))


@pytest.mark.parametrize("zero_point", range(16))
def test_products_with_zero_points_are_held(zero_point: int) -> None:
    zeros = torch.full((40, 100), float(zero_point))
    scale, kept = half_grid(Grid(scales(), zeros))
    assert kept is zeros
    for held in (scale, scale * zero_point):
        assert np.array_equal(held.numpy().astype(np.float16).astype(np.float32), held.numpy())
    # The odd part of a zero point has n bits; half a step of the other 11 - n is lost at most.
    odd = zero_point // (zero_point & -zero_point or 1)
    bits = 11 - (odd.bit_length() if odd > 1 else 0)
    normal = scales() >= 2**-14
    assert ((scale - scales()).abs() <= scales() * 2.0**-bits)[normal].all()


def test_no_better_scale_has_as_few_bits() -> None:
    """Of all multiples of 2^-7 between 1 and 2, what is taken beside a zero point of 13 is the nearest."""
    given = 1 + torch.rand(1, 200, generator=torch.Generator().manual_seed(1))
    found = half_grid(Grid(given, torch.full_like(given, 13))).scale
    steps = 1 + torch.arange(65) / 64
    nearest = steps[(given[0, :, None] - steps).abs().argmin(1)]
    assert torch.equal(found[0], nearest)


def test_what_is_held_stays() -> None:
    zeros = torch.randint(0, 16, (40, 100), generator=torch.Generator().manual_seed(2)).float()
    once = half_grid(Grid(scales(), zeros))
    assert torch.equal(half_grid(once).scale, once.scale)
