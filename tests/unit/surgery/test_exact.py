"""What a cast of a model leaves as it is: rotary angles and Hadamards against their closed forms."""

import copy
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import LlamaConfig

from kurtail_pl.maths.hadamard import random_hadamard_factors
from kurtail_pl.methods import Uniform
from kurtail_pl.surgery.equip import empty_model
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.online import OnlineHadamard

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "there and back": lambda module: module.half().to(torch.bfloat16).float(),
    "with its device": lambda module: module.to("cpu", torch.bfloat16),
    "a copy": lambda module: copy.deepcopy(module).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_rotary_angles_are_those_of_the_formula(cast: str) -> None:
    """Frequencies rounded to bfloat16 turn the last of 4096 positions the wrong way."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    rotary = CASTS[cast](empty_model(config).get_submodule("model.rotary_emb"))
    positions = torch.arange(4096).unsqueeze(0)
    cos, sin = rotary(torch.empty(1, dtype=torch.float32), positions)
    angles = positions[0].double()[:, None] * 10000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    # Of an angle of 4096 float32 holds 2.4e-4, and the frequency itself 6e-8 of it.
    torch.testing.assert_close(cos[0, :, :16].double(), angles.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[0, :, 16:].double(), angles.sin(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_of_every_family_keep_their_type(family: str) -> None:
    config = FAMILIES[family]()
    rotary = empty_model(config).get_submodule(architecture_of(config).rotary)
    before = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    assert before
    for name, buffer in rotary.bfloat16().named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("size", [172, 256])
def test_an_online_hadamard_stays_orthogonal(cast: str, size: int) -> None:
    factors = random_hadamard_factors(size, torch.Generator().manual_seed(0))
    module = CASTS[cast](OnlineHadamard(factors))
    turned = module(torch.eye(size))
    torch.testing.assert_close(turned.double(), factors.dense(), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned @ turned.T, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cast", CASTS)
def test_scales_of_packed_weights_are_not_rounded(cast: str) -> None:
    """The weight is then that of the codes, rounded once to the type that multiplies."""
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 24)
    linear.weight.data = torch.randn(24, 32, generator=draw)
    module, weights = QuantizedLinear(linear, None, None), Uniform(4, False)
    quantized = weights.nearest(linear.weight.data)
    module.pack(quantized, weights)
    grid = quantized.grid
    assert grid.zero_point is not None
    wanted = (quantized.codes.double() - grid.zero_point.double()) * grid.scale.double()
    torch.testing.assert_close(CASTS[cast](module).dense_weight().double(), wanted, rtol=1e-6, atol=0)


def test_a_move_without_a_cast_is_left_alone() -> None:
    module = OnlineHadamard(random_hadamard_factors(8, torch.Generator().manual_seed(0)))
    assert module.to("meta").left.is_meta
    assert module.to_empty(device="cpu").left.shape == (2, 2)
