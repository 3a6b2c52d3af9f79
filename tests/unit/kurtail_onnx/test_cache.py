"""The packed cache against a loop over single values in numpy."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import Array, random_array, run_graph
from kurtail_onnx.forms import CacheIntegers
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.cache import CachePart, append, parts_of

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, dequantize, fake_quantize, quantize

BATCH, HEADS, TOKENS, DIM = 2, 3, 5, 8
QUANTIZERS = [
    Quantizer(bits, symmetric, clip)
    for bits in (4, 8)
    for symmetric in (False, True)
    for clip in (Clip(amount=0.95), Clip("quantile", 0.9))
]


def parts(keys: Quantizer | None, values: Quantizer | None, packed: bool = True) -> list[CachePart]:
    return parts_of(CacheIntegers(keys, values), packed, HEADS, DIM, ir.DataType.FLOAT)


def appended(
    keys: Quantizer | None,
    x: Array,
    past: dict[str, Array],
    values: Quantizer | None = None,
    packed: bool = True,
) -> dict[str, Array]:
    """Outputs of one step: ``y`` and ``z``, the keys and values that attention reads, and the present arrays.

    Values are the keys, negated, in a cache of their own quantizer, or of none.
    """
    g, kept = GraphBuilder(ir.DataType.FLOAT), parts(keys, values, packed)
    states = g.input("x", ir.DataType.FLOAT, ["batch", HEADS, "tokens", DIM])
    read = append(g, (states, g.op("Neg", states)), 0, kept, CacheIntegers(keys, values))
    outputs = {name: g.reshape(value, 0, 0, 0, 0) for name, value in zip("yz", read, strict=True)}
    names = [*(output.name or "" for output in g.graph.outputs), *outputs]
    past = past or {
        a.past(0): np.zeros((BATCH, a.heads, 0, a.width), a.dtype.numpy()) for part in kept for a in part.arrays
    }
    return dict(zip(names, run_graph(g, outputs, x=x, **past), strict=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_bytes_and_values_are_those_of_the_quantizer(quantizer: Quantizer) -> None:
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    outputs = appended(quantizer, values, {})
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


@pytest.mark.parametrize("own", [Quantizer(4, False, Clip(amount=0.95)), Quantizer(4, False, Clip(amount=0.9))])
@pytest.mark.parametrize("packed", [True, False])
def test_keys_and_values_together_are_those_apart(packed: bool, own: Quantizer) -> None:
    """Packed they share arrays, whatever their clips; heads of keys come first."""
    keys = Quantizer(4, False, Clip(amount=0.95))
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    together = appended(keys, values, {}, own, packed)
    np.testing.assert_array_equal(together["y"], fake_quantize(torch.from_numpy(values), keys).numpy())
    np.testing.assert_array_equal(together["z"], fake_quantize(torch.from_numpy(-values), own).numpy())
    if packed:
        names = [f"present.0.key_value{end}" for end in ("", "_scale", "_zero_point")]
        apart = appended(keys, values, {}), appended(own, -values, {})
        for name in names:
            halves = [part[name.replace("_value", "")] for part in apart]
            np.testing.assert_array_equal(together[name], np.concatenate(halves, axis=1))
    else:
        assert set(together) == {"present.0.key", "present.0.value", "y", "z"}


def test_keys_of_other_bits_than_values_have_arrays_of_their_own() -> None:
    assert [part.name for part in parts(Quantizer(4, False), Quantizer(8, False))] == ["key", "value"]
    assert [part.name for part in parts(Quantizer(4, False), Quantizer(4, True))] == ["key", "value"]
    assert [part.name for part in parts(Quantizer(4, False), None)] == ["key", "value"]
    assert [part.states for part in parts(Quantizer(4, False), Quantizer(4, False))] == [("key", "value")]


@pytest.mark.parametrize("values", [None, Quantizer(4, False, Clip(amount=0.95))])
def test_new_tokens_come_behind_the_cached_ones(values: Quantizer | None) -> None:
    keys = Quantizer(4, False, Clip(amount=0.95))
    x = random_array(BATCH, HEADS, TOKENS, DIM)
    whole = appended(keys, x, {}, values)
    first = appended(keys, x[:, :, :3], {}, values)
    past = {name.replace("present", "past_key_values"): a for name, a in first.items() if name.startswith("present")}
    second = appended(keys, x[:, :, 3:], past, values)
    for name, array in whole.items():
        np.testing.assert_array_equal(second[name], array)


@pytest.mark.parametrize("quantizer", [None, Quantizer(4, False, Clip(amount=0.95))])
def test_a_float_cache_holds_values(quantizer: Quantizer | None) -> None:
    values = random_array(BATCH, HEADS, TOKENS, DIM)
    outputs = appended(quantizer, values, {}, packed=False)
    expected = values if quantizer is None else fake_quantize(torch.from_numpy(values), quantizer).numpy()
    np.testing.assert_array_equal(outputs["present.0.key"], expected)
    np.testing.assert_array_equal(outputs["y"], expected)


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.29), (128, 0.27)])
def test_a_packed_token_is_small(head_dim: int, most: float) -> None:
    own = CacheIntegers(Quantizer(4, False), Quantizer(4, False))
    x = np.ones((1, 1, 1, head_dim), np.float16)
    g = GraphBuilder(ir.DataType.FLOAT16)
    states = g.input("x", ir.DataType.FLOAT16, ["batch", 1, "tokens", head_dim])
    append(g, (states, states), 0, parts_of(own, True, 1, head_dim, ir.DataType.FLOAT16), own)
    past = {
        v.name or "": np.zeros((1, 2, 0, int(v.shape[3])), v.dtype.numpy()) for v in g.graph.inputs if v is not states
    }
    arrays = run_graph(g, {}, x=x, **past)
    assert len(arrays) == 3
    assert sum(array.nbytes for array in arrays) <= most * 2 * x.nbytes
