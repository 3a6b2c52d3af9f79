"""The packed cache against a loop over single values in numpy."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import Array, random_array, run_graph
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.cache import CachePart, append

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, dequantize, fake_quantize, quantize

BATCH, HEADS, TOKENS, DIM = 2, 3, 5, 8
QUANTIZERS = [
    Quantizer(bits, symmetric, clip)
    for bits in (4, 8)
    for symmetric in (False, True)
    for clip in (Clip(amount=0.95), Clip("quantile", 0.9))
]


def cache_part(quantizer: Quantizer | None, packed: bool = True, name: str = "key") -> CachePart:
    return CachePart(name, quantizer, packed, HEADS, DIM, ir.DataType.FLOAT)


def appended(
    part: CachePart, values: Array, past: dict[str, Array], beside: Quantizer | None = None
) -> dict[str, Array]:
    """Outputs of one step: ``y``, the keys that attention reads, and the present arrays.

    Values come beside the keys, negated, in a cache of their own quantizer, or of none.
    """
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", HEADS, "tokens", DIM])
    other = cache_part(beside, part.packed, "value")
    keys, negated = append(g, x, g.op("Neg", x), 0, part, other)
    outputs = {"y": g.reshape(keys, 0, 0, 0, 0), "z": g.reshape(negated, 0, 0, 0, 0)}
    names = [*(output.name or "" for output in g.graph.outputs), *outputs]
    past = past or {
        a.past(0): np.zeros((BATCH, HEADS, 0, a.width), a.dtype.numpy()) for a in (*part.arrays, *other.arrays)
    }
    return dict(zip(names, run_graph(g, outputs, x=values, **past), strict=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_bytes_and_values_are_those_of_the_quantizer(quantizer: Quantizer) -> None:
    part = cache_part(quantizer)
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    outputs = appended(part, values, {})
    expected = quantize(torch.from_numpy(values), quantizer)
    stored = expected.codes.numpy().astype(np.int64) + (2 ** (quantizer.bits - 1) if quantizer.symmetric else 0)
    bytes_ = outputs["present.0.key"]
    assert bytes_.dtype == np.uint8
    for place in np.ndindex(BATCH, HEADS, TOKENS, DIM):
        if quantizer.bits == 8:
            code = bytes_[place]
        else:
            byte = bytes_[(*place[:3], place[3] % (DIM // 2))]
            code = byte % 16 if place[3] < DIM // 2 else byte // 16
        assert code == stored[place]
    # torch interpolates a quantile with one rounding less.
    tolerance = 0 if quantizer.clip.kind == "ratio" else 3e-7
    np.testing.assert_allclose(outputs["present.0.key_scale"], expected.grid.scale.numpy(), rtol=tolerance)
    if not quantizer.symmetric:
        assert expected.grid.zero_point is not None
        np.testing.assert_array_equal(outputs["present.0.key_zero_point"], expected.grid.zero_point.numpy())
    np.testing.assert_allclose(outputs["y"], dequantize(expected).numpy(), rtol=tolerance)


def test_keys_and_values_quantized_together_are_those_quantized_apart() -> None:
    quantizer = Quantizer(4, False, Clip(amount=0.95))
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    together = appended(cache_part(quantizer), values, {}, beside=quantizer)
    apart = appended(cache_part(quantizer), values, {}, beside=Quantizer(4, False, Clip(amount=0.9)))
    np.testing.assert_array_equal(together["y"], apart["y"])
    np.testing.assert_array_equal(together["z"], fake_quantize(torch.from_numpy(-values), quantizer).numpy())
    assert set(together) == set(apart)


def test_new_tokens_come_behind_the_cached_ones() -> None:
    part = cache_part(Quantizer(4, False, Clip(amount=0.95)))
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    whole = appended(part, values, {})
    first = appended(part, values[:, :, :3], {})
    past = {name.replace("present", "past_key_values"): a for name, a in first.items() if name.startswith("present")}
    second = appended(part, values[:, :, 3:], past)
    for name, array in whole.items():
        np.testing.assert_array_equal(second[name], array)


@pytest.mark.parametrize("quantizer", [None, Quantizer(4, False, Clip(amount=0.95))])
def test_a_float_cache_holds_values(quantizer: Quantizer | None) -> None:
    part = cache_part(quantizer, packed=False)
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    outputs = appended(part, values, {})
    expected = values if quantizer is None else fake_quantize(torch.from_numpy(values), quantizer).numpy()
    np.testing.assert_array_equal(outputs["present.0.key"], expected)
    np.testing.assert_array_equal(outputs["y"], expected)


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.29), (128, 0.27)])
def test_a_packed_token_is_small(head_dim: int, most: float) -> None:
    part = CachePart("key", Quantizer(4, False), True, 1, head_dim, ir.DataType.FLOAT16)
    x = np.ones((1, 1, 1, head_dim), np.float16)
    g = GraphBuilder(ir.DataType.FLOAT16)
    states = g.input("x", ir.DataType.FLOAT16, ["batch", 1, "tokens", head_dim])
    append(g, states, states, 0, part, replace(part, name="value"))
    past = {
        v.name or "": np.zeros((1, 1, 0, int(v.shape[3])), v.dtype.numpy()) for v in g.graph.inputs if v is not states
    }
    arrays = run_graph(g, {}, x=x, **past)
    assert sum(array.nbytes for array in arrays) <= most * 2 * x.nbytes
