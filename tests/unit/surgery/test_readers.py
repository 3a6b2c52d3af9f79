"""Linears that read the same inputs: each gives what it gives alone, and the work for an input is done once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import RTN, Moments, Uniform
from kurtail_pl.surgery.linear import QuantizedLinear, read_together

WIDTH, ROWS = 24, 5
MAP = 4 + 6
"""Multiplications of a number by its map."""


def linears(weights: Uniform | None = None, activations: Quantizer | None = None) -> list[QuantizedLinear]:
    """Three of one map; each has weights of its own."""
    torch.manual_seed(0)
    factors = Kronecker(torch.randn(4, 4), torch.randn(6, 6))
    made = [QuantizedLinear(nn.Linear(WIDTH, rows).requires_grad_(False), None, activations) for rows in (8, 16, 24)]
    for linear in made:
        linear.put_transform(factors)
        if weights is not None:
            assert linear.weight is not None
            linear.pack(RTN().codes(linear.weight, weights, Moments(None, None)), weights)
    return made


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [None, Uniform(8)], ids=["floats", "codes"])
@torch.no_grad()
def test_each_gives_what_it_gives_alone(weights: Uniform | None) -> None:
    alone, together = linears(weights, Quantizer(8)), linears(weights, Quantizer(8))
    read_together(together)
    for seed in (0, 1):
        x = inputs(seed)
        assert all(torch.equal(one(x), other(x)) for one, other in zip(together, alone, strict=True))
    assert together[0]._readers._kept is None  # The last one has read it.


@torch.no_grad()
def test_one_map_of_an_input_for_all() -> None:
    made = linears()
    read_together(made)
    with FlopCounterMode(display=False) as counter:
        x = inputs()
        for linear in made:
            linear(x)
    assert counter.get_total_flops() == 2 * ROWS * WIDTH * (MAP + 8 + 16 + 24)


def changed_input(x: Tensor, linear: QuantizedLinear) -> Tensor:
    return x.neg_()


def other_input(x: Tensor, linear: QuantizedLinear) -> Tensor:
    return x.clone().neg_()


def float_input(x: Tensor, linear: QuantizedLinear) -> Tensor:
    linear.activations = None
    return x


@pytest.mark.parametrize("change", [changed_input, other_input, float_input])
@torch.no_grad()
def test_nothing_is_taken_for_what_it_is_not(change: Callable[[Tensor, QuantizedLinear], Tensor]) -> None:
    """An input changed in place, another one, and one that is to be quantized no more."""
    together, (_, alone, _) = linears(activations=Quantizer(4)), linears(activations=Quantizer(4))
    read_together(together)
    first, second, _ = together
    x = inputs()
    first(x)
    assert torch.equal(second(change(x, second)), alone(change(inputs(), alone)))


def test_gradients_are_those_of_each_alone() -> None:
    found = []
    for together in (True, False):
        made, x = linears(), inputs().requires_grad_()
        if together:
            read_together(made)
        torch.cat([linear(x) for linear in made], -1).square().sum().backward()
        assert made[0]._readers._kept is None
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
