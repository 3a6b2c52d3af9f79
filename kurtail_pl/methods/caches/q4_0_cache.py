"""llama.cpp's cache of type q4_0, behind the Hadamard that llama.cpp puts before a quantized cache.

Read in llama.cpp of 2026-10-01: `ggml_gen_hadamard`, `build_input_k_rot` and `build_input_v_rot` of
`src/llama-kv-cache.cpp`, and `quantize_row_q4_0_ref` of `ggml/src/ggml-quants.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.constructions import hadamard_matrix
from kurtail_pl.maths.quantizers import split_groups
from kurtail_pl.methods.caches.turned import Turn, TurnedCache

BLOCK = 32
"""Channels that share a scale."""
SMALLEST_TURN = 64
"""Heads that this does not divide are not turned."""


@dataclass(frozen=True)
class Q4_0Cache(TurnedCache):  # noqa: N801 - ggml's name
    """What llama.cpp does with ``-ctk q4_0`` (keys) and ``-ctv q4_0`` (values).

    Queries stay as they are here; llama.cpp's CPU backend rounds them to 8 bits for its products with such keys.
    """

    # Annotated for jsonargparse: see PerTokenHead.
    label: ClassVar[str] = "q4_0"

    def sentence(self) -> str:
        """Whose it is."""
        return f"{self.what} in Q4_0, blocks of {BLOCK} channels, behind llama.cpp's Hadamard, as its cache type q4_0"

    def require(self, head_dim: int) -> None:
        """Blocks must divide the width."""
        if head_dim % BLOCK:
            raise ConfigError(
                f"the cache is llama.cpp's q4_0, whose blocks of {BLOCK} channels do not divide this model's heads of "
                f"{head_dim}; use kurtail_pl.methods.PerTokenHead"
            )

    def scale_bits(self, head_dim: int) -> float:
        """A float16 for a block."""
        return 16 / BLOCK

    def key_turn(self, head_dim: int, device: torch.device) -> Turn | None:
        """Sylvester's Hadamard over blocks of the largest 64 * 2^j that divides the width."""
        return None if head_dim % SMALLEST_TURN else _turn(head_dim, head_dim & -head_dim, device)

    def value_turn(self, head_dim: int, device: torch.device) -> Turn | None:
        """Over blocks of 64."""
        return None if head_dim % SMALLEST_TURN else _turn(head_dim, SMALLEST_TURN, device)

    def rounded(self, turned: Tensor, dtype: torch.dtype) -> Tensor:
        """The number of largest magnitude in a block, the first of several, is -8 of its scale, stored in float16."""
        blocks = split_groups(turned, BLOCK)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale == 0, 0, 1 / scale)
        codes = (blocks * inverse + 8.5).floor().clamp(max=15)
        return ((codes - 8) * scale.half().float()).flatten(-2)


@cache
def _turn(head_dim: int, block: int, device: torch.device) -> Turn:
    matrix = torch.kron(torch.eye(head_dim // block), hadamard_matrix(block).float() / block**0.5).to(device)
    return Turn(matrix, matrix)  # It is symmetric.
