"""llama.cpp's 4-bit cache (`-ctk q4_0 -ctv q4_0`), with the Hadamard by which it turns quantized caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import split_groups
from kurtail_pl.methods.caches.turned import TurnedCache, block_hadamard

BLOCK = 32
"""Numbers with one scale."""
TURNED = 64
"""Widths that are multiples of this are turned: values in blocks of so many, keys in the largest that 64 2^j gives."""


@dataclass(frozen=True)
class Q4Blocks(TurnedCache):
    """Codes of 4 bits in blocks of 32, whose number of largest magnitude is the code -8 exactly.

    Read in llama.cpp: `quantize_row_q4_0_ref` in ggml/src/ggml-quants.c, and src/llama-kv-cache.cpp.
    """

    label: ClassVar[str] = "q4_0"

    def sentence(self) -> str:
        """In words."""
        return "keys and values in llama.cpp's q4_0, behind its own Hadamard"

    def require(self, head_dim: int) -> None:
        """Blocks must divide the width."""
        if head_dim % BLOCK:
            raise ConfigError(
                f"head_dim is {head_dim}, and llama.cpp's q4_0 has blocks of {BLOCK}; write cache: null (float16)"
            )

    def key_basis(self, head_dim: int) -> Tensor:
        """In the largest blocks; widths that it does not turn stay."""
        turned = head_dim & -head_dim
        return block_hadamard(head_dim, turned if turned >= TURNED else 1)

    def value_basis(self, head_dim: int) -> Tensor:
        """In blocks of 64."""
        return block_hadamard(head_dim, TURNED if head_dim % TURNED == 0 else 1)

    def rounded(self, x: Tensor) -> Tensor:
        """By blocks; the scale that is read is a float16."""
        blocks = split_groups(x, BLOCK)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        codes = torch.trunc(blocks * inverse + 8.5).clamp(0, 15)
        return ((codes - 8) * scale.half().float()).reshape(x.shape)
