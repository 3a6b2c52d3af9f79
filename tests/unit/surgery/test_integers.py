"""Products of integers against int64 and float64 by hand, and against the simulation in floats."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kurtail_pl
from kurtail_pl.maths.clip import Clip, LearnedClip
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, quantize
from kurtail_pl.methods import Uniform
from kurtail_pl.surgery import linear as linear_module
from kurtail_pl.surgery.integers import integer_product, integer_weight, multiplies
from kurtail_pl.surgery.linear import QuantizedLinear

SYMMETRIC = Quantizer(4, symmetric=True, clip=Clip(amount=0.9))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(rows: int, columns: int, activations: Quantizer, weights: Uniform, bias: bool = True) -> QuantizedLinear:
    """A linear with codes, some of which are the smallest that there are."""
    linear = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    linear.weight.data = drawn(rows, rows, columns)
    layer = QuantizedLinear(linear, None, activations)
    quantized = weights.nearest(linear.weight)
    quantized.codes[0] = weights.code_range[0]
    layer.pack(quantized, weights)
    return layer


@pytest.mark.parametrize(("bits", "weight_bits", "symmetric"), list(product((2, 4, 8), (3, 4, 8), (True, False))))
def test_products_are_those_of_int64(bits: int, weight_bits: int, symmetric: bool) -> None:
    """Of codes that no quantizer chose, the largest and smallest among them."""
    activations, weights = Quantizer(bits, symmetric), Uniform(weight_bits)
    generator = torch.Generator().manual_seed(bits)
    (low, high), (least, most) = activations.code_range, weights.code_range
    codes = torch.randint(low, high + 1, (5, 33), generator=generator)
    codes[0], codes[1] = low, high
    rows = torch.randint(least, most + 1, (7, 33), generator=generator)
    rows[0], rows[1] = least, most
    scale, scales = torch.rand(5, 1, generator=generator) + 0.1, torch.rand(7, 1, generator=generator) + 0.1
    zero_point = None if symmetric else torch.randint(0, high + 1, (5, 1), generator=generator).float()
    quantized = Quantized(codes.to(activations.code_dtype), Grid(scale, zero_point))
    weight = integer_weight(Quantized(rows.to(torch.int8), Grid(scales, None)), activations)
    exact = (codes - (0 if zero_point is None else zero_point.long())) @ rows.T
    expected = exact.double() * scale.double() * scales.double().T
    # The integer, its product with one scale and with the other are each rounded to 24 bits.
    found = integer_product(quantized, activations, weight)
    assert torch.allclose(found.double(), expected, rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize(
    "activations", [SYMMETRIC, Quantizer(8, symmetric=False), Quantizer(4, symmetric=False)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_gives_what_its_simulation_stands_for(
    monkeypatch: pytest.MonkeyPatch, activations: Quantizer, bias: bool
) -> None:
    layer, x = packed(24, 40, activations, Uniform(4), bias), drawn(1, 2, 9, 40)
    codes, (scale, zero_point) = quantize(x, activations)
    values = (codes.double() - (0 if zero_point is None else zero_point.double())) * scale.double()
    weight = layer.dense_weight().double()
    expected = values @ weight.T + (layer.bias.double() if bias else 0)
    # float32 holds products with 24 bits, and a sum of 40 of them as many as it is long.
    bound = 42 * 2**-24 * (values.abs() @ weight.abs().T + 1)
    for quick in (True, False):
        monkeypatch.setattr(linear_module, "processor_multiplies_integers", lambda quick=quick: quick)
        assert ((layer(x).double() - expected).abs() <= bound).all()


def test_rows_are_the_same_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are summed without rounding, so that it does not matter in what order."""
    monkeypatch.setattr(linear_module, "processor_multiplies_integers", lambda: True)
    layer, x = packed(24, 40, SYMMETRIC, Uniform(4)), drawn(1, 64, 40)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_other_codes_and_scales_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are unpacked once; whoever puts others in their place, or changes them, gets others."""
    monkeypatch.setattr(linear_module, "processor_multiplies_integers", lambda: True)
    x = drawn(1, 3, 40)
    layer, other = (packed(24, 40, SYMMETRIC, Uniform(4), bias=False) for _ in range(2))
    first = layer(x)
    other.pack(Uniform(4).nearest(drawn(5, 24, 40)), Uniform(4))
    wanted = other(x)
    assert not torch.equal(first, wanted)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    layer.scale *= 2
    assert torch.equal(layer(x), 2 * wanted)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("activations", "weights"),
    [
        (None, Uniform(4)),
        (Quantizer(4, group_size=8), Uniform(4)),
        (Quantizer(4, clip=LearnedClip(torch.ones(1))), Uniform(4)),
        (SYMMETRIC, Uniform(4, group_size=8)),
        (SYMMETRIC, Uniform(4, symmetric=False)),
        (SYMMETRIC, None),
    ],
)
def test_what_has_several_scales_or_learns_is_simulated(activations: Quantizer | None, weights: Uniform | None) -> None:
    assert not multiplies(activations, weights)


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through inputs, and to a scale that learns: both need the floats."""
    monkeypatch.setattr(linear_module, "processor_multiplies_integers", lambda: True)
    layer, x = packed(24, 40, SYMMETRIC, Uniform(4)), drawn(1, 3, 40).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), atol=1e-5)
    layer.scale = nn.Parameter(layer.scale)
    layer(x.detach()).sum().backward()
    assert layer.scale.grad is not None


def test_a_loaded_artefact_has_the_simulations_logits(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token a text: behind it a rounding may fall otherwise."""
    ids = torch.arange(12)[:, None]
    logits = []
    for quick in (True, False):
        monkeypatch.setattr(linear_module, "processor_multiplies_integers", lambda quick=quick: quick)
        logits.append(kurtail_pl.load(artefact)(ids).logits)
    change = (logits[0] - logits[1]).abs().amax(-1) / logits[1].abs().amax()
    assert change.median() < 1e-5
