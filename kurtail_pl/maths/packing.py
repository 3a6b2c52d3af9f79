"""Two 4-bit codes to a byte: the one layout of weights and caches, in memory and in files."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte: ``[..., n]`` -> uint8 ``[..., n/2]``.

    The low nibble holds the first half of the last dimension, the high nibble the second half, as two's complement
    for signed codes.

    Raises:
        ValueError: when n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"packing needs an even number of codes in a row, got {codes.shape[-1]}")
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low & 0xF) | (high << 4)


def unpack_codes(packed: Tensor, signed: bool) -> Tensor:
    """Inverse of `pack_codes`: uint8 ``[..., n/2]`` -> int8 (uint8 when not signed) ``[..., n]``."""
    codes = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    return (codes.to(torch.int8) ^ 8) - 8 if signed else codes
