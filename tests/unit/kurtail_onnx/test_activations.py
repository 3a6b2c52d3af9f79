"""Activation quantization in the graph: the quantizers of `maths`, bit for bit where the clip is a ratio."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import random_array, run_graph
from kurtail_onnx.graph.activations import fake_quantized, integer_rows
from kurtail_onnx.graph.builder import GraphBuilder

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, dequantize, fake_quantize, quantize

BATCH, TOKENS, SIZE = 2, 7, 48
QUANTIZERS = [
    Quantizer(bits, symmetric, clip, group)
    for bits in (4, 8)
    for symmetric in (True, False)
    for clip, group in (
        (Clip(amount=0.9), None),
        (Clip(), 16),
        (Clip("quantile", 0.98), None),
        (Clip("quantile", 0.931), 12),
    )
]


def graph() -> tuple[GraphBuilder, ir.Value, ir.Value]:
    g = GraphBuilder(ir.DataType.FLOAT)
    return g, g.input("x", ir.DataType.FLOAT, ["batch", "tokens", SIZE]), g.ints(BATCH, TOKENS, -1)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_fake_quantized_is_torchs(quantizer: Quantizer) -> None:
    g, x, shape = graph()
    values = random_array(BATCH, TOKENS, SIZE)
    (found,) = run_graph(g, {"y": fake_quantized(g, x, SIZE, quantizer, shape)}, x=values)
    # torch interpolates a quantile with one rounding less.
    tolerance = 0 if quantizer.clip.kind == "ratio" else 3e-7
    np.testing.assert_allclose(found, fake_quantize(torch.from_numpy(values), quantizer).numpy(), rtol=tolerance)


@pytest.mark.parametrize("quantizer", QUANTIZERS[:4], ids=str)
def test_the_grid_is_the_formulas(quantizer: Quantizer) -> None:
    """Against numpy in float64, with its own quantile; a value on the border of two codes may take either."""
    g, x, shape = graph()
    values = random_array(BATCH, TOKENS, SIZE)
    (found,) = run_graph(g, {"y": fake_quantized(g, x, SIZE, quantizer, shape)}, x=values)
    rows = values.astype(np.float64).reshape(-1, quantizer.group_size or SIZE)
    amount, largest = quantizer.clip.amount, 2 ** (quantizer.bits - 1) - 1
    magnitude = np.abs(rows)
    limit = amount * magnitude.max(1) if quantizer.clip.kind == "ratio" else np.quantile(magnitude, amount, axis=1)
    scale = np.where(limit > 0, limit / largest, 1)[:, None]
    steps = found.astype(np.float64).reshape(rows.shape) / scale
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert steps.min() >= -largest - 1 - 1e-4
    assert steps.max() <= largest + 1e-4
    inside = np.abs(rows / scale) < largest
    assert np.abs(rows / scale - steps)[inside].max() < 0.5001


@pytest.mark.parametrize("clip", [Clip(amount=0.9), Clip("quantile", 0.98)])
def test_integer_rows_are_the_codes(clip: Clip) -> None:
    quantizer = Quantizer(4, True, clip)
    g, x, shape = graph()
    values = random_array(BATCH, TOKENS, SIZE)
    rows = integer_rows(g, x, SIZE, quantizer, shape)
    codes, scale = run_graph(g, {"c": rows.codes, "s": rows.scale}, x=values)
    expected = quantize(torch.from_numpy(values), quantizer)
    np.testing.assert_array_equal(codes, expected.codes.reshape(-1, SIZE).numpy())
    np.testing.assert_array_equal((codes * scale).reshape(values.shape), dequantize(expected).numpy())


def test_some_tokens_are_one_text() -> None:
    g, x, _ = graph()
    values = random_array(1, TOKENS, SIZE)
    (found,) = run_graph(g, {"y": fake_quantized(g, x, SIZE, Quantizer(), None)}, x=values[:, :0])
    assert found.shape == (1, 0, SIZE)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_doubles_are_torchs(quantizer: Quantizer) -> None:
    g = GraphBuilder(ir.DataType.DOUBLE)
    x = g.input("x", ir.DataType.DOUBLE, ["batch", "tokens", SIZE])
    values = random_array(BATCH, TOKENS, SIZE).astype(np.float64)
    (found,) = run_graph(g, {"y": fake_quantized(g, x, SIZE, quantizer, g.ints(BATCH, TOKENS, -1))}, x=values)
    np.testing.assert_allclose(found, fake_quantize(torch.from_numpy(values), quantizer).numpy(), rtol=1e-14)


def test_doubles_on_a_border_go_to_the_even_code() -> None:
    """Quarters of a step, and the same numbers after a product that changes their last bits."""
    values = np.random.default_rng(0).integers(-28, 29, size=(1, TOKENS, SIZE)) / 4
    values[..., 0] = 7
    for factor in (1.0, 0.1, 1 / 3):
        g = GraphBuilder(ir.DataType.DOUBLE)
        x = g.input("x", ir.DataType.DOUBLE, ["batch", "tokens", SIZE])
        (found,) = run_graph(g, {"y": fake_quantized(g, x, SIZE, Quantizer(), None)}, x=values * factor)
        np.testing.assert_allclose(found, values.round() * factor, rtol=1e-14)
