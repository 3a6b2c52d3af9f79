"""vLLM's 4-bit cache (`--kv-cache-dtype int4_per_token_head`), as its kernels compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods.caches.turned import TurnedCache, block_hadamard

SEED = 0x9E3779B9
"""Of the signs (`_get_rht_signs`)."""
LARGEST = 15
SMALLEST_SCALE = 1e-6
LOW_BITS = 15
"""Of a scale's float32, where the zero point is hidden: a scale is read without them."""


@dataclass(frozen=True)
class Int4PerTokenHead(TurnedCache):
    """Codes of 4 bits from the smallest to the largest number of each token and head, behind a random Hadamard.

    Read in vLLM 0.32, `v1/attention/ops/int4_per_token_head.py`: `single_rht` and `_reshape_cache_int4_kernel`.
    """

    label: ClassVar[str] = "int4-per-token-head"

    def sentence(self) -> str:
        """In words."""
        return "keys and values in vLLM's int4_per_token_head, behind its own Hadamard"

    def require(self, head_dim: int) -> None:
        """Two codes are a byte."""
        if head_dim % 2:
            raise ConfigError(f"head_dim is {head_dim}, and vLLM's 4-bit cache takes even ones; write cache: null")

    def key_basis(self, head_dim: int) -> Tensor:
        """Blocks of the largest power of two that divides the width."""
        return block_hadamard(head_dim, head_dim & -head_dim, SEED)

    def value_basis(self, head_dim: int) -> Tensor:
        """That of keys."""
        return self.key_basis(head_dim)

    def rounded(self, x: Tensor) -> Tensor:
        """Halves go away from zero. Numbers of one sign only are cut off where the grid from zero on ends."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        # The kernel's Hadamard has no unit rows; its smallest scale is so much smaller here.
        block = x.shape[-1] & -x.shape[-1]
        scale = ((high - low) / LARGEST).clamp(min=SMALLEST_SCALE / block**0.5)
        zero_point = _nearest(-low / scale).clamp(0, LARGEST)
        codes = _nearest(x * (1.0 / scale) + zero_point).clamp(0, LARGEST)
        read = (scale.view(torch.int32) & ~LOW_BITS).view(torch.float32)
        return (codes - zero_point) * read


def _nearest(x: Tensor) -> Tensor:
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))
