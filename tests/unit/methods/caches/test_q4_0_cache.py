"""llama.cpp's q4_0 cache against gguf's own numpy, behind scipy's Hadamard."""

import numpy as np
import pytest
import torch
from gguf.quants import Q4_0
from scipy.linalg import block_diag, hadamard
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import Q4_0Cache

CACHE = Q4_0Cache()
KEY_BLOCKS = {32: 1, 64: 64, 96: 1, 128: 128, 192: 64, 256: 256}
"""Of the Hadamard, by the width of a head; 1 is none."""


def states(head_dim: int, seed: int = 0) -> Tensor:
    """With an outlier, a row of zeros, and two numbers of one largest magnitude in a block."""
    x = torch.randn(2, 3, 7, head_dim, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0, 5] = 40.0
    x[0, 1, 2] = 0
    x[1, 2, 3] = 0
    x[1, 2, 3, :4] = torch.tensor([0.5, -2.0, 2.0, 0.5])
    return x


def matrix(head_dim: int, block: int) -> np.ndarray:
    return block_diag(*[hadamard(block) / block**0.5] * (head_dim // block)).astype(np.float32)


def rounded(turned: np.ndarray) -> np.ndarray:
    return Q4_0.dequantize(Q4_0.quantize(turned))


@pytest.mark.parametrize("head_dim", [32, 96])
def test_unturned_heads_are_ggufs_bit_for_bit(head_dim: int) -> None:
    x = states(head_dim)
    for kept in (CACHE.kept_keys(x, None), CACHE.kept_values(x, None)):
        assert torch.equal(kept, torch.from_numpy(rounded(x.numpy())))
    assert CACHE.value_basis(head_dim) is None


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_codes_of_turned_rows_are_ggufs_bit_for_bit(head_dim: int) -> None:
    turned = states(head_dim) @ torch.from_numpy(matrix(head_dim, 64))
    assert torch.equal(CACHE.rounded(turned, torch.float32), torch.from_numpy(rounded(turned.numpy())))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_keys_and_values_are_turned_in_blocks_of_their_own(head_dim: int) -> None:
    """Float32 sums in another order may bring a number over a border of two codes: nearly all rows must be equal."""
    x = states(head_dim)
    for kept, block in ((CACHE.kept_keys(x, None), KEY_BLOCKS[head_dim]), (CACHE.kept_values(x, None), 64)):
        turn = matrix(head_dim, block)
        expected = rounded(x.numpy() @ turn) @ turn
        near = np.isclose(kept.numpy(), expected, rtol=0, atol=1e-5 * np.abs(x.numpy()).max())
        assert near.all(-1).mean() > 0.95
        assert (kept - x).square().mean() / x.square().mean() < 0.02
    basis = CACHE.value_basis(head_dim)
    assert basis is not None
    exact = block_diag(*[hadamard(64) / 8] * (head_dim // 64))
    torch.testing.assert_close(basis, torch.from_numpy(exact), rtol=0, atol=1e-15)


def test_parts_of_it() -> None:
    x = states(64)
    keys, values = CACHE.without("values"), CACHE.without("keys")
    assert (keys, values) == (Q4_0Cache(values=False), Q4_0Cache(keys=False))
    assert keys is not None
    assert values is not None
    assert [each.name for each in (CACHE, keys, values)] == ["kv4", "k4v16", "k16v4"]
    assert keys.without("keys") is values.without("values") is None
    assert torch.equal(keys.kept_values(x, None), x)
    assert torch.equal(values.kept_keys(x, None), x)
    assert torch.equal(keys.kept_keys(x, None), CACHE.kept_keys(x, None))
    assert values.sentence().startswith("values in Q4_0")
    assert CACHE.quantizer("keys") is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_are_kept_and_gradients_pass(dtype: torch.dtype) -> None:
    x = states(64).to(dtype).requires_grad_()
    kept = CACHE.kept_keys(x, None)
    assert kept.dtype == dtype
    assert torch.equal(kept.detach(), CACHE.kept_keys(x.detach(), None))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (kept * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 32 channels do not divide this model's heads of 80; use"):
        CACHE.require(80)
    CACHE.require(96)
    with pytest.raises(ConfigError, match=r"cache\.keys and cache\.values are false; write cache: null"):
        Q4_0Cache(False, False)
