"""MXFP4 and NVFP4 against the OCP table, torch's own 8-bit types, and a brute force over all codes and scales."""

import itertools

import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import MXFP4, NVFP4, Format

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


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_what_is_stored_comes_back(weights: Format) -> None:
    quantized = weights.nearest(weight())
    stored = weights.pack(quantized)
    buffers = weights.buffers(6, 96)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == buffers
    back = weights.unpack(stored, 96)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.grid.scale, quantized.grid.scale)
    bits = 8 * sum(t.numel() * t.element_size() for t in stored.values()) / (6 * 96)
    assert bits == pytest.approx({32: 4.25, 16: 4.5}[weights.group_size or 0], rel=0.02)


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


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4()])
def test_blocks_of_zeros_and_tiny_ones_beside_large_ones(weights: Format) -> None:
    x = torch.zeros(2, 96)
    x[0, :32] = 1e-6
    x[1, 32:64] = 3.0
    values = weights.values(weights.unpack(weights.pack(weights.nearest(x)), 96))
    assert values.isfinite().all()
    assert torch.equal(values[1, 32:64], x[1, 32:64])
    assert not values[:, 64:].any()
    zeros = torch.zeros(2, 96)
    assert torch.equal(weights.values(weights.unpack(weights.pack(weights.nearest(zeros)), 96)), zeros)


@pytest.mark.parametrize(("weights", "width"), list(itertools.product([MXFP4(), NVFP4()], [40, 100])))
def test_widths_that_blocks_do_not_divide(weights: Format, width: int) -> None:
    with pytest.raises(ConfigError, match=rf"weights.group_size is {weights.group_size} .* {width} channels"):
        weights.require("weights", (96, width))
