"""Blocks against the dequantizers of the package gguf, for codes and scales drawn at random."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize
from kurtail_gguf import blocks
from kurtail_gguf.forms import Form, form_of

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.half_grid import half_grid
from kurtail_pl.maths.quantizers import Grid, Quantized
from kurtail_pl.methods import MXFP4, NVFP4, Format, Uniform

ROWS, COLUMNS = 6, 192


def drawn(weights: Format) -> Quantized:
    """Every code, in every place, on scales of all sizes."""
    draw = torch.Generator().manual_seed(0)
    low, high = weights.code_range
    codes = torch.randint(low, high + 1, (ROWS, COLUMNS), generator=draw).to(weights.code_dtype)
    groups = COLUMNS // (weights.group_size or COLUMNS)
    scale = torch.exp(3 * torch.randn(ROWS, groups, generator=draw) - 4)
    asymmetric = isinstance(weights, Uniform) and not weights.symmetric
    zeros = torch.randint(0, high + 1, scale.shape, generator=draw).float() if asymmetric else None
    if isinstance(weights, Uniform):
        return Quantized(codes, half_grid(Grid(scale, zeros)))
    return Quantized(codes, Grid(weights.project(scale), None))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        (Uniform(4, True, None, "float16"), Kind.Q4_0),
        (Uniform(2, True, 64, "float16"), Kind.Q4_0),
        (Uniform(4, False, None, "float16"), Kind.Q4_1),
        (Uniform(3, False, 32, "float16"), Kind.Q4_1),
        (Uniform(8, True, 96, "float16"), Kind.Q8_0),
        (Uniform(6, True, None, "float16"), Kind.Q8_0),
        (MXFP4(), Kind.MXFP4),
        (NVFP4(), Kind.NVFP4),
    ],
    ids=str,
)
def test_nothing_is_rounded(weights: Format, kind: Kind) -> None:
    quantized, form = drawn(weights), form_of(weights)
    assert isinstance(form, Form)
    assert form.kind == kind
    tensors = weights.pack(quantized)
    found = dequantize(form.pack(tensors, COLUMNS), kind)
    scale = 1.0 if form.scale is None else tensors[form.scale].numpy()
    assert np.array_equal(found * scale, weights.values(quantized).numpy())


@pytest.mark.parametrize("scale", [0.1, 1e-9, 1e5])
def test_a_scale_that_float16_does_not_hold_is_refused(scale: float) -> None:
    codes = torch.ones(1, 32, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"float16 does not hold; quantize with scheme\.weights\.scales: float16"):
        blocks.q4_0(Quantized(codes, Grid(torch.tensor([[scale]]), None)))


def test_a_product_that_float16_does_not_hold_is_refused() -> None:
    """1 + 2^-10 is a float16, and 15 times that is none."""
    codes, scale = torch.ones(1, 32, dtype=torch.uint8), torch.tensor([[1 + 2**-10]])
    with pytest.raises(ConfigError, match="product with a zero point"):
        blocks.q4_1(Quantized(codes, Grid(scale, torch.tensor([[15.0]]))))
    blocks.q4_1(Quantized(codes, Grid(scale, torch.tensor([[8.0]]))))
