"""KVQuant's cache against numpy, number by number."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import NUQCache
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.stages.text import TextSpec

TOKENS, HEADS, WIDTH = 400, 2, 8


def states(seed: int) -> Tensor:
    """``[tokens, kv_heads, head_dim]`` with a scale and a middle for each channel, and a few numbers far out."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HEADS, WIDTH, generator=draw) * (torch.rand(HEADS, WIDTH, generator=draw) * 5 + 0.1)
    x += 10 * torch.randn(HEADS, WIDTH, generator=draw)
    x[3, 1] *= 20
    return x


def rounded(row: np.ndarray, low: float, high: float, levels: np.ndarray) -> list[float]:
    middle, half = (high + low) / 2, (high - low) / 2
    found = []
    for x in row:
        if low <= x <= high:
            found.append(float(levels[np.abs(levels - (x - middle) / half).argmin()]) * half + middle)
        else:
            found.append(float(np.float16(x)))
    return found


@pytest.mark.parametrize(("keys", "values"), [(4, 4), (3, 2)])
@pytest.mark.parametrize("outliers", [0.01, 0.2])
def test_keys_by_channel_and_values_by_token(keys: int, values: int, outliers: float) -> None:
    cache, x, y = NUQCache(keys, values, outliers), states(0), states(1)  # type: ignore[arg-type]
    found = cache.fitted(x, y)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: buffer.shape for name, buffer in cache.buffers(HEADS, WIDTH).items()
    }
    kept_x, kept_y = (
        keep(part.transpose(0, 1)[None], None, found)[0].transpose(0, 1).numpy()
        for keep, part in ((cache.kept_keys, x), (cache.kept_values, y))
    )
    share = 0
    beyond = round(TOKENS * outliers / 2)
    for head in range(HEADS):
        for channel in range(WIDTH):
            column = x[:, head, channel].numpy()
            low, high = np.sort(column)[[beyond, -beyond - 1]]
            assert (low, high) == tuple(float(found[end][head, 0, channel]) for end in ("key_low", "key_high"))
            share += int(((column < low) | (column > high)).sum())
            wanted = rounded(column, low, high, found["key_levels"].numpy())
            np.testing.assert_allclose(kept_x[:, head, channel], wanted, rtol=1e-5, atol=1e-5)
    assert share == 2 * beyond * HEADS * WIDTH
    beyond = round(HEADS * WIDTH * outliers / 2)
    for token in range(TOKENS):
        row = y[token].flatten().numpy()
        low, high = np.sort(row)[[beyond, -beyond - 1]]
        wanted = rounded(row, low, high, found["value_levels"].numpy())
        np.testing.assert_allclose(kept_y[token].flatten(), wanted, rtol=1e-5, atol=1e-4)


def test_levels_have_less_error_than_equal_steps() -> None:
    """Of the states themselves, outliers apart: they are the best for errors in their own units."""
    cache, x = NUQCache(3, None), states(2)
    found = cache.fitted(x, x)
    keys = x.transpose(0, 1)[None]
    kept = (
        cache.kept_keys(keys, None, {**found, "key_levels": levels})
        for levels in (found["key_levels"], torch.linspace(-1, 1, 8))
    )
    best, even = (float((each - keys).square().sum()) for each in kept)
    assert best < 0.8 * even


def test_nothing_is_rounded_before_something_is_found() -> None:
    x = states(3).transpose(0, 1)[None]
    cache = NUQCache()
    assert torch.equal(cache.kept_keys(x, None), x)
    assert torch.equal(cache.kept_values(x, None), x)


def test_a_constant_channel_is_kept_and_gradients_pass() -> None:
    x = states(4)
    x[:, 0, 0] = 7.0
    found = NUQCache().fitted(x, x)
    keys = x.transpose(0, 1)[None].requires_grad_()
    kept = NUQCache().kept_keys(keys, None, found)
    assert torch.allclose(kept[0, 0, :, 0], torch.tensor(7.0), atol=1e-6)
    assert kept.isfinite().all()
    nothing = NUQCache().fitted(torch.ones(9, 1, 4), torch.ones(9, 1, 4))
    assert torch.equal(NUQCache().kept_values(torch.ones(1, 1, 9, 4), None, nothing), torch.ones(1, 1, 9, 4))
    kept.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_without_outliers_keys_beyond_their_range_go_to_its_end() -> None:
    cache, x = NUQCache(3, 3, 0.0), states(5)
    found = cache.fitted(x, x)
    low, high = (found[name].double().numpy() for name in ("key_low", "key_high"))
    keys = 3 * (x.transpose(0, 1) - x.mean()).double()
    kept = cache.kept_keys(keys[None], None, found)[0].numpy()
    middle, half = (high + low) / 2, (high - low) / 2
    levels = found["key_levels"].double().numpy()
    ends = np.clip(keys.numpy(), low, high)
    nearest = np.abs((ends - middle)[..., None] / half[..., None] - levels).argmin(-1)
    assert (keys.numpy() != ends).mean() > 0.1
    np.testing.assert_allclose(kept, levels[nearest] * half + middle, rtol=0, atol=1e-9)
    assert np.all([len(np.unique(channel)) <= 8 for channel in kept.transpose(0, 2, 1).reshape(-1, TOKENS)])


def test_a_text_without_one_outlier_is_refused() -> None:
    said = r"cache\.outliers is 0\.01 and the calibration text has 96 tokens, .* give 100 tokens or more"
    with pytest.raises(ConfigError, match=said):
        QuantizeSpec(Scheme(cache=NUQCache()), text=TextSpec(windows=2, seqlen=48))
    for cache, windows in ((NUQCache(outliers=0.0), 2), (NUQCache(keys=None), 2), (NUQCache(), 3), (NUQCache(), None)):
        QuantizeSpec(Scheme(cache=cache), text=TextSpec(windows=windows, seqlen=48))


def test_bits_count_outliers_and_ranges() -> None:
    """KVQuant's 4.32, 3.32 and 2.32: an outlier in a hundred takes 32 bits more; a token's values have two numbers."""
    for bits in (4, 3, 2):
        cache = NUQCache(bits, bits)  # type: ignore[arg-type]
        assert cache.bits_per_number("keys", 8, 128) == pytest.approx(bits + 0.32)
        assert cache.bits_per_number("values", 8, 128) == pytest.approx(bits + 0.32 + 32 / 1024)
    assert NUQCache(4, None).bits_per_number("values", 8, 128) == 16
    assert NUQCache(outliers=0.0).bits_per_number("keys", 8, 128) == 4


def test_name_sentence_and_what_is_refused() -> None:
    assert NUQCache().name == "kv4"
    assert NUQCache(3, 2).name == "k3v2"
    assert NUQCache(3).sentence() == (
        "keys before RoPE by channel in 3 bits, values by token in 4 bits, k-means levels, 1 % outliers"
    )
    assert NUQCache().without("keys") == NUQCache(None)
    assert NUQCache(None).without("values") is NUQCache(4, None).without("keys") is None
    assert not NUQCache().packs
    with pytest.raises(ConfigError, match=r"cache\.keys and cache\.values are null; write cache: null"):
        NUQCache(None, None)
    with pytest.raises(ConfigError, match=r"cache\.outliers is 0\.6; give a share from 0 to 0\.5"):
        NUQCache(outliers=0.6)
    with pytest.raises(ConfigError, match="keys is 5"):
        NUQCache(keys=5)  # type: ignore[arg-type]
