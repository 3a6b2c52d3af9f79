"""vLLM's cache against its kernel written out number by number, behind scipy's Hadamard and vLLM's signs."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import Int4PerTokenHead

CACHE = Int4PerTokenHead()
SIGNS = "+-++----+--++-+-++--+++-+-+--++-+---++-++-+-++---------+-------+"
"""What `_get_rht_signs` of vLLM 0.32.0 gives for a width of 64, and its beginning for smaller ones."""


def states(head_dim: int) -> Tensor:
    """With an outlier, a row of zeros, and a row that is far from zero."""
    x = torch.randn(2, 3, 7, head_dim, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 5] = 40.0
    x[0, 1, 2] = 0
    x[1, 1, 2] += 9
    return x


def rounded_by_hand(row: np.ndarray) -> np.ndarray:
    """One token of one head, in float32 as the kernel: the zero point goes into the scale's last bits and out."""
    one, half = np.float32(1), np.float32(0.5)
    scale = max((row.max() - row.min()) / np.float32(15), np.float32(1e-6))
    zero_point = -row.min() / scale
    zero_point = np.clip(np.trunc(zero_point + (half if zero_point >= 0 else -half)), 0, 15)
    inverse, codes = one / scale, []
    for x in row:
        code = x * inverse + np.float32(zero_point)
        codes.append(np.clip(np.trunc(code + (half if code >= 0 else -half)), 0, 15))
    stored = (np.float32(scale).view(np.int32) & -16) | int(zero_point)
    assert stored & 15 == zero_point
    read = np.int32(stored & -16).view(np.float32)
    return (np.array(codes, np.float32) - np.float32(zero_point)) * read


def by_hand(x: np.ndarray) -> np.ndarray:
    return np.apply_along_axis(rounded_by_hand, -1, x)


@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_turned_rows_are_the_kernels_bit_for_bit(head_dim: int) -> None:
    x = states(head_dim)
    assert torch.equal(CACHE.rounded(x, torch.float32), torch.from_numpy(by_hand(x.numpy())))


@pytest.mark.parametrize(("head_dim", "block"), [(32, 32), (64, 64), (80, 16), (96, 32)])
def test_keys_and_values_are_turned_by_vllms_signs(head_dim: int, block: int) -> None:
    """Float32 sums in another order may bring a number over a border of two codes: nearly all rows must be equal."""
    x = states(head_dim)
    signs = np.array([1 if sign == "+" else -1 for sign in SIGNS[:block]])
    blocks = x.numpy().reshape(*x.shape[:-1], -1, block)
    turned = ((blocks * signs) @ hadamard(block)).astype(np.float32).reshape(x.shape)
    read = by_hand(turned).reshape(blocks.shape)
    expected = (read @ hadamard(block) * signs / block).reshape(x.shape)
    for kept in (CACHE.kept_keys(x, None), CACHE.kept_values(x, None)):
        near = np.isclose(kept.numpy(), expected, rtol=0, atol=1e-5 * np.abs(x.numpy()).max())
        assert near.all(-1).mean() > 0.95
    basis = CACHE.value_basis(head_dim)
    assert basis is not None
    exact = np.kron(np.eye(head_dim // block), signs[:, None] * hadamard(block) / block**0.5)
    torch.testing.assert_close(basis, torch.from_numpy(exact), rtol=0, atol=1e-15)


def test_scores_of_queries_turned_alike_are_those_of_keys_turned_back() -> None:
    """As vLLM has it: queries turned, keys as read, scores divided by the block."""
    keys, queries = states(64), torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(1))
    turn = CACHE.key_turn(64, keys.device).forth
    vllms = (queries @ turn) @ CACHE.rounded(keys @ turn, torch.float32).mT / 64
    ours = queries @ CACHE.kept_keys(keys, None).mT
    torch.testing.assert_close(ours, vllms, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert (ours - queries @ keys.mT).abs().max() > 1e-2


def test_a_row_far_from_zero_loses_its_end() -> None:
    """The grid has its zero among codes 0 to 15, and so many steps: from 8 to 12 it ends at 4, half of the least."""
    row = torch.linspace(8, 12, 32).view(1, 1, 1, 32)
    read = CACHE.rounded(row, torch.float32)
    assert read.max() == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_are_kept_and_gradients_pass(dtype: torch.dtype) -> None:
    x = states(64).to(dtype).requires_grad_()
    kept = CACHE.kept_values(x, None)
    assert kept.dtype == dtype
    assert torch.equal(kept.detach(), CACHE.kept_values(x.detach(), None))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (kept * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def test_name_and_what_is_refused() -> None:
    assert CACHE.name == "kv4"
    assert CACHE.without("keys") == Int4PerTokenHead(keys=False)
    assert CACHE.sentence().startswith("keys and values in 4 bits, asymmetric")
    for head_dim in (16, 65):
        with pytest.raises(ConfigError, match=f"even number of channels from 32 on, and this model's have {head_dim}"):
            CACHE.require(head_dim)
    CACHE.require(80)
    with pytest.raises(ConfigError, match=r"cache\.keys and cache\.values are false; write cache: null"):
        Int4PerTokenHead(False, False)
