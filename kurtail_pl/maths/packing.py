"""Codes of less than eight bits in bytes: the one layout of weights and caches, in memory and in files.

A code is cut in planes of 4, 2 and 1 bits, as many as its bits ask for: 3 bits are two of 2 and 1. The low bits come
first. Of each plane, a byte holds the same bits of 2, 4 or 8 codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = (8, 4, 2, 1)


def pack_codes(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes in as many bytes as their bits fill: ``[..., n]`` -> uint8 ``[..., n bits / 8]``.

    A plane of k bits has ``n k / 8`` bytes. The lowest k bits of each hold codes of the first ``n k / 8`` ones, the
    next k bits those of the next as many, and so on: of 4 bits the low nibble holds the first half, the high nibble the
    second. Signed codes are in two's complement.

    Raises:
        ValueError: when n codes do not fill bytes.
    """
    if stored_bits(bits, codes.shape[-1]) != bits:
        number = 8 // _planes(bits)[-1]
        raise ValueError(f"packing {bits} bits needs a multiple of {number} codes in a row, got {codes.shape[-1]}")
    values, parts, low = codes.to(torch.uint8), [], 0
    for width in _planes(bits):
        first, *others = ((values >> low) & ((1 << width) - 1)).chunk(8 // width, dim=-1)
        for number, part in enumerate(others, 1):
            first = first | (part << number * width)
        parts.append(first)
        low += width
    return torch.cat(parts, dim=-1)


def unpack_codes(packed: Tensor, signed: bool, bits: int = 4) -> Tensor:
    """Inverse of `pack_codes`: uint8 ``[..., n bits / 8]`` -> int8 (uint8 when not signed) ``[..., n]``."""
    sizes = [packed.shape[-1] * width // bits for width in _planes(bits)]
    codes, low = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for width, plane in zip(_planes(bits), torch.split(packed, sizes, dim=-1), strict=True):
        mask = (1 << width) - 1
        part = torch.cat([(plane >> start) & mask for start in range(0, 8, width)], dim=-1)
        codes = part if low == 0 else codes | (part << low)
        low += width
    half = 1 << (bits - 1)
    return (codes.to(torch.int8) ^ half) - half if signed else codes


def stored_bits(bits: int, count: int) -> int:
    """Bits that codes take in rows of a number of them: the fewest that hold them and fill bytes."""
    return next(width for width in range(bits, 9) if count % (8 // _planes(width)[-1]) == 0)


def _planes(bits: int) -> tuple[int, ...]:
    """Bits of each plane of a code, the lowest first."""
    return tuple(width for width in PLANES if bits & width)
