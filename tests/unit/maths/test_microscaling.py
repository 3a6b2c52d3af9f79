"""E2M1, E8M0 and E4M3 against the OCP tables, torch's own 8-bit types, and MXFP4's and NVFP4's definitions in NumPy."""

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.microscaling import e2m1_halves, e4m3_scales, e8m0_scales, whole_scale
from kurtail_pl.maths.quantizers import Quantizer, dequantize, fake_quantize, quantize
from kurtail_pl.methods import MXFP4, NVFP4, Format, PerTokenHead, SearchedClips
from kurtail_pl.methods.scheme import Scheme

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
"""OCP Microscaling Formats 1.0, table 5."""
SIGNED = [*E2M1, *(-level for level in E2M1)]
MX = Quantizer(group_size=32, levels="e2m1", scales="e8m0")
NV = Quantizer(group_size=16, levels="e2m1", scales="e4m3")
NVINT = Quantizer(group_size=16, scales="e4m3")


def rows(seed: int = 0, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(40, width, generator=draw) * torch.logspace(-5, 4, 40)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_ties_and_ends(dtype: torch.dtype) -> None:
    """Each level itself, the middle of two (even mantissa), and both sides of it."""
    given, expected = [*E2M1, 6.1, 100.0], [*E2M1, 6, 6]
    for number, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        given += [middle, middle - 0.0625, middle + 0.0625]
        expected += [low if number % 2 == 0 else high, low, high]
    x = 2 * torch.tensor([*given, *(-each for each in given)], dtype=dtype)
    found = (e2m1_halves(x.clone()) / 2).tolist()
    assert found == [*expected, *(-each for each in expected)]


def test_every_scale_of_e8m0_is_torchs() -> None:
    """All 255 numbers: a block whose largest magnitude is just six, or just under eight, scales."""
    torchs = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    for largest in (4.0, 6.0, 8 - 2.0**-40):
        assert torch.equal(e8m0_scales(torchs * largest, 6), torchs)
    assert e8m0_scales(torch.zeros(1), 6).tolist() == [1]
    assert e8m0_scales(torch.tensor([8.0, 7.9999995]), 6).tolist() == [2, 1]


def test_every_scale_of_e4m3_is_torchs() -> None:
    """All positive numbers are kept, and what lies between goes to the nearest."""
    torchs = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(e4m3_scales(torchs, torch.ones(())), torchs)
    assert torch.equal(e4m3_scales(torchs * 2.0**-7, torch.tensor(2.0**-7)), torchs * 2.0**-7)
    middle = (torchs[1:] + torchs[:-1]) / 2
    for shift, neighbour in ((-1e-3, torchs[:-1]), (1e-3, torchs[1:])):
        assert torch.equal(e4m3_scales(middle * (1 + shift), torch.ones(())), neighbour)
    assert e4m3_scales(torch.tensor([0.0, 1e9]), torch.ones(())).tolist() == [2.0**-9, 448]
    for largest in (1e-6, 1.0, 447.9, 448.0, 448.1):
        assert 224 < largest / whole_scale(torch.tensor(largest, dtype=torch.float64)) <= 448


def brute_force(x: Tensor, scale: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """The distance of each number of blocks ``[blocks, n]`` to the nearest level in their scales ``[blocks]``."""
    found: np.ndarray = np.abs(x.double().numpy()[..., None] - (np.array(levels) * scale[:, None])[:, None]).min(-1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_in_mxfp4(dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    blocks = x.view(-1, 32)
    scale = 2.0 ** (np.floor(np.log2(blocks.double().abs().amax(-1).numpy())) - 2)
    error = (fake_quantize(x, MX) - x).view(-1, 32).double().abs().numpy()
    np.testing.assert_allclose(error, brute_force(blocks, scale, SIGNED), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("quantizer", "largest"), [(NV, 6), (NVINT, 7)])
def test_inputs_in_blocks_of_sixteen(quantizer: Quantizer, largest: int) -> None:
    """Scales by torch's E4M3, in units of the power of two that suits the token."""
    x = rows(1)
    blocks = x.view(40, -1, 16)
    wanted = blocks.abs().amax(-1).double() / largest
    unit = 2.0 ** torch.ceil(torch.log2(wanted.amax(-1, keepdim=True) / 448))
    scale = (wanted / unit).float().to(torch.float8_e4m3fn).double() * unit
    levels = SIGNED if largest == 6 else [*range(-8, 8)]
    error = (fake_quantize(x, quantizer) - x).view(-1, 16).double().abs().numpy()
    expected = brute_force(blocks.reshape(-1, 16), scale.flatten().numpy(), levels)
    np.testing.assert_allclose(error, expected, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("quantizer", [MX, NV, NVINT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_integer_form_is_the_fake_form(quantizer: Quantizer, dtype: torch.dtype) -> None:
    x = torch.cat([rows(2)[5:35], torch.zeros(1, 96)]).to(dtype)
    quantized = quantize(x, quantizer)
    low, high = quantizer.code_range
    assert quantized.codes.dtype == torch.int8
    assert low <= quantized.codes.min() <= quantized.codes.max() <= high
    fake = fake_quantize(x, quantizer)
    assert torch.equal(dequantize(quantized), fake)
    assert fake.isfinite().all()
    assert not fake[-1].any()


@pytest.mark.parametrize(("quantizer", "weights"), [(MX, MXFP4()), (NV, NVFP4())])
def test_inputs_have_the_levels_of_weights(quantizer: Quantizer, weights: Format) -> None:
    """A power of two times a level is a weight of the format, too: what a kernel multiplies is of one type."""
    x = rows(3)[20:21] * 2.0**-4
    fake = fake_quantize(x, quantizer)
    assert torch.equal(weights.values(weights.nearest(fake)), fake)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": "e3m0"}, "levels is 'e3m0'; write integer or e2m1"),
        ({"scales": "int8"}, "scales is 'int8'; write float32 or e8m0 or e4m3"),
        ({"levels": "e2m1", "bits": 8}, "levels is e2m1 and bits is 8"),
        ({"levels": "e2m1", "symmetric": False}, "symmetric is false; only integers with float32 scales"),
        ({"scales": "e8m0", "symmetric": False}, "symmetric is false; only integers with float32 scales"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantizer(**settings)  # type: ignore[arg-type]


def test_cards_have_levels_and_scales() -> None:
    scheme = Scheme(weights=MXFP4(), activations=MX, cache=PerTokenHead(keys=NVINT, values=MX))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert str(MX) == "4-bit floating point (E2M1), scales in E8M0, clip ratio 1, groups of 32"
    assert str(NVINT) == "4 bits, symmetric, scales in E4M3, clip ratio 1, groups of 16"


def test_a_cache_of_these_levels_is_kept_but_not_packed() -> None:
    states = rows(4, 32)[None, None]
    cache = PerTokenHead(keys=NVINT, values=MX)
    assert torch.equal(cache.kept_values(states, None), fake_quantize(states, MX))
    assert not cache.packs
    integers = PerTokenHead(keys=NVINT, values=NVINT)
    assert integers.packs
    assert torch.equal(integers.read("keys", integers.stored("keys", states)), integers.kept_keys(states, None))


def test_clips_and_static_scales_are_of_integers() -> None:
    with pytest.raises(ConfigError, match=r"names activations and scheme.activations is 4-bit floating point"):
        SearchedClips(["activations"]).require(Scheme(activations=MX), True)
    with pytest.raises(ConfigError, match="activation_scales is static and activations are 4-bit floating"):
        Scheme(activations=Quantizer(levels="e2m1", clip=Clip()), activation_scales="static")
