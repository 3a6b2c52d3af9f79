"""Caches of runtimes: their rules written out number by number in numpy, and the reader of gguf."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray
from scipy.linalg import hadamard

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import Int4PerTokenHead, Q4Blocks
from kurtail_pl.methods.cache import CacheFormat
from kurtail_pl.methods.scheme import Scheme

Array = NDArray[np.float32]


def states(head_dim: int, seed: int = 0) -> torch.Tensor:
    """Keys or values ``[2, 3, 5, head_dim]`` with one channel that is far larger than the others, and one of zeros."""
    x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(seed))
    x[..., 1] *= 20
    x[0, 0, 0] = 0
    return x


def int4(x: Array) -> Array:
    """vLLM's `_reshape_cache_int4_kernel` for one token and head, and how the cache is read, in float32."""
    one = np.float32
    scale = max(one((x.max() - x.min()) / one(15)), one(1e-6))

    def away(value: np.float32) -> np.float32:
        return one(np.trunc(value + one(0.5))) if value >= 0 else one(np.trunc(value - one(0.5)))

    zero_point = np.clip(away(-x.min() / scale), 0, 15)
    codes = np.array([np.clip(away(one(value * (one(1) / scale)) + zero_point), 0, 15) for value in x], dtype=one)
    bits = (np.array([scale]).view(np.int32) & -16) | int(zero_point)
    read, zero = (bits & -16).view(np.float32), (bits & 15).astype(np.float32)
    return np.asarray((codes - zero) * read, dtype=one)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_codes_of_vllm(shift: float) -> None:
    """A token whose numbers have all one sign is cut off there, and here."""
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) + shift
    expected = np.stack([int4(row * np.float32(4)) / np.float32(4) for row in x.numpy()])
    assert np.array_equal(Int4PerTokenHead().rounded(x).numpy(), expected)


def test_codes_of_llama_cpp() -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 3
    x[0] = 0
    kind = GGMLQuantizationType.Q4_0
    assert np.array_equal(Q4Blocks().rounded(x).numpy(), dequantize(quantize(x.numpy(), kind), kind))


@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (96, 32), (80, 16), (6, 2)])
def test_vllm_turns_by_the_largest_power_of_two(head_dim: int, block: int) -> None:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator).numpy() - 1
    expected = np.kron(np.eye(head_dim // block), np.diag(signs) @ hadamard(block)) / block**0.5
    cache = Int4PerTokenHead()
    for basis in (cache.key_basis(head_dim), cache.value_basis(head_dim)):
        np.testing.assert_allclose(basis.numpy(), expected, atol=1e-15)


@pytest.mark.parametrize(("head_dim", "keys", "values"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (96, 1, 1)])
def test_llama_cpp_turns_multiples_of_64(head_dim: int, keys: int, values: int) -> None:
    cache = Q4Blocks()
    for basis, block in ((cache.key_basis(head_dim), keys), (cache.value_basis(head_dim), values)):
        expected = np.kron(np.eye(head_dim // block), hadamard(block)) / block**0.5
        np.testing.assert_allclose(basis.numpy(), expected, atol=1e-15)


@pytest.mark.parametrize("cache", [Int4PerTokenHead(), Q4Blocks()], ids=str)
def test_what_is_kept_is_turned_back(cache: CacheFormat) -> None:
    """As scores and outputs have it where queries are turned and outputs turned back."""
    keys, values, queries = states(64), states(64, 1), states(64, 2)
    found_scores = (queries @ cache.kept_keys(keys, None).mT).double().numpy()
    found_values = cache.kept_values(values, None).double().numpy()
    key_basis, value_basis = (basis(64) for basis in (cache.key_basis, cache.value_basis))  # type: ignore[attr-defined]
    stored = cache.rounded(keys @ key_basis.float()).double()  # type: ignore[attr-defined]
    scores = ((queries.double() @ key_basis) @ stored.mT).numpy()
    assert np.abs(found_scores - scores).max() < 1e-4 * np.abs(scores).max()
    stored = cache.rounded(values @ value_basis.float()).double()  # type: ignore[attr-defined]
    np.testing.assert_allclose(found_values, (stored @ value_basis.mT).numpy(), atol=1e-4)
    relative = (values - cache.kept_values(values, None)).norm() / values.norm()
    assert 0.01 < relative < 0.2


@pytest.mark.parametrize("cache", [Int4PerTokenHead(), Q4Blocks()], ids=str)
def test_gradients_pass_the_rounding(cache: CacheFormat) -> None:
    """As if nothing had been rounded, which makes turning there and back the identity."""
    keys = states(64).requires_grad_()
    weight = torch.randn(64, generator=torch.Generator().manual_seed(3))
    (cache.kept_keys(keys, None) * weight).sum().backward()
    assert keys.grad is not None
    torch.testing.assert_close(keys.grad, weight.expand_as(keys), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("cache", "head_dim", "wanted"), [(Int4PerTokenHead(), 15, "even ones"), (Q4Blocks(), 48, "blocks of 32")], ids=str
)
def test_widths_that_it_cannot_keep(cache: CacheFormat, head_dim: int, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"head_dim is {head_dim}, .*{wanted}"):
        cache.require(head_dim)


@pytest.mark.parametrize("cache", [Int4PerTokenHead(), Q4Blocks()], ids=str)
def test_names(cache: CacheFormat) -> None:
    assert Scheme(cache=cache).name == "w4a4kv4"
    assert CacheFormat.from_dict(cache.to_dict()) == cache
    assert "its own Hadamard" in cache.sentence()
