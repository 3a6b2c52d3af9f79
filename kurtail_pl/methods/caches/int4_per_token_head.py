"""vLLM's cache `int4_per_token_head`, as its kernel writes and reads it, behind vLLM's own randomized Hadamard.

Read in vLLM 0.32.0, `v1/attention/ops/int4_per_token_head.py`: the kernels `_reshape_cache_int4_kernel` and
`_attn_packed`, and `single_rht`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.constructions import hadamard_matrix
from kurtail_pl.methods.caches.turned import Turn, TurnedCache

SIGNS_SEED = 0x9E3779B9
SMALLEST_SCALE = 1e-6
SMALLEST_HEAD = 32
"""vLLM's Triton backend, which alone has this cache, takes no smaller ones."""
SCALE_BITS = -16
"""All bits of a float32 scale but the lowest four, where the zero point is stored."""


@dataclass(frozen=True)
class Int4PerTokenHead(TurnedCache):
    """What vLLM does with ``--kv-cache-dtype int4_per_token_head``.

    A scale and a zero point for each token and head, from its smallest and largest number: unlike `PerTokenHead`, the
    grid need not hold zero. vLLM keeps both keys and values so; either alone shows what it costs.
    """

    # Annotated for jsonargparse: see PerTokenHead.
    label: ClassVar[str] = "int4-per-token-head"

    def sentence(self) -> str:
        """Whose it is."""
        return (
            f"{self.what} in 4 bits, asymmetric, one scale for each token and head behind a randomized Hadamard, as "
            "vLLM's int4_per_token_head"
        )

    def require(self, head_dim: int) -> None:
        """Two codes share a byte, and small heads have no kernel."""
        if head_dim % 2 or head_dim < SMALLEST_HEAD:
            raise ConfigError(
                f"the cache is vLLM's int4_per_token_head, which takes heads of an even number of channels from "
                f"{SMALLEST_HEAD} on, and this model's have {head_dim}; use kurtail_pl.methods.PerTokenHead"
            )

    def scale_bits(self, head_dim: int) -> float:
        """A float32 for a head, which holds the zero point."""
        return 32 / head_dim

    def key_turn(self, head_dim: int, device: torch.device) -> Turn:
        """Random signs and Sylvester's Hadamard over blocks of the largest power of two that divides the width."""
        return _turn(head_dim, device)

    def value_turn(self, head_dim: int, device: torch.device) -> Turn:
        """The same."""
        return _turn(head_dim, device)

    def rounded(self, turned: Tensor, dtype: torch.dtype) -> Tensor:
        """Half away from zero; turned rows are in the model's type before, and longer by the root of the block."""
        x = turned.to(dtype).float()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=SMALLEST_SCALE)
        zero_point = (-low / scale + 0.5).floor().clamp(0, 15)
        codes = (x * (1 / scale) + zero_point + 0.5).floor().clamp(0, 15)
        return (codes - zero_point) * (scale.view(torch.int32) & SCALE_BITS).view(torch.float32)


@cache
def _turn(head_dim: int, device: torch.device) -> Turn:
    block = head_dim & -head_dim
    generator = torch.Generator().manual_seed(SIGNS_SEED)
    signs = 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1
    # Not divided by the root of the block: vLLM rounds what is longer by that, and divides by the block in the end.
    matrix = torch.kron(torch.eye(head_dim // block), signs[:, None] * hadamard_matrix(block).float())
    return Turn(matrix.to(device), (matrix.mT / block).to(device))
