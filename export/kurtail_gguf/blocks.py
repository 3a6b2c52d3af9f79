"""Codes and scales as the bytes of GGUF's blocks (llama.cpp's `ggml-common.h`); nothing is rounded."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantized

Bytes = NDArray[np.uint8]
BLOCK, NVFP4_BLOCK = 32, 64
"""Inputs of a block; NVFP4's holds four of sixteen."""


def q4_0(quantized: Quantized) -> Bytes:
    """Symmetric codes from -8 to 7: float16 ``d`` and 32 codes, each standing for ``d (code - 8)``."""
    codes, scales = _blocks(quantized)
    return _joined(_halves(scales), _nibbles(codes + 8))


def q4_1(quantized: Quantized) -> Bytes:
    """Codes from 0 to 15 with a zero point z: float16 ``d`` and ``m = -z d``, each code standing for ``d code + m``."""
    codes, scales = _blocks(quantized)
    zero_point = quantized.grid.zero_point
    assert zero_point is not None
    zeros = _of_blocks(zero_point, scales.shape[1])
    return _joined(_halves(scales), _halves(-zeros * scales), _nibbles(codes))


def q8_0(quantized: Quantized) -> Bytes:
    """Symmetric codes of up to 8 bits: float16 ``d`` and 32 signed bytes."""
    codes, scales = _blocks(quantized)
    return _joined(_halves(scales), codes.astype(np.int8).view(np.uint8))


def mxfp4(codes: Tensor, exponents: Tensor) -> Bytes:
    """E2M1 codes ``[out, in]`` and E8M0 exponents ``[out, in / 32]``: a byte of these, then 32 codes."""
    grouped = codes.numpy().reshape(len(codes), -1, BLOCK)
    return _joined(exponents.numpy()[..., None], _nibbles(grouped))


def nvfp4(codes: Tensor, scales: Tensor) -> Bytes:
    """E2M1 codes ``[out, in]`` and E4M3 bytes ``[out, in / 16]``: four of these, then four times 16 codes."""
    rows = len(codes)
    grouped = codes.numpy().reshape(rows, -1, 4, NVFP4_BLOCK // 4)
    return _joined(scales.numpy().reshape(rows, -1, 4), _nibbles(grouped).reshape(rows, -1, NVFP4_BLOCK // 2))


def _blocks(quantized: Quantized) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Codes ``[out, blocks, 32]``, and the scale of each block ``[out, blocks]``."""
    codes = quantized.codes.to(torch.int16).numpy()
    grouped = codes.reshape(len(codes), -1, BLOCK)
    return grouped, _of_blocks(quantized.grid.scale, grouped.shape[1])


def _of_blocks(groups: Tensor, count: int) -> NDArray[np.float32]:
    """Numbers of groups ``[out, groups]``, repeated for each of their blocks ``[out, count]``."""
    numbers: NDArray[np.float32] = groups.float().numpy()
    return np.repeat(numbers, count // numbers.shape[1], axis=1)


def _halves(numbers: NDArray[np.float32]) -> Bytes:
    """Bytes of float16 numbers, ``[..., 2]``.

    Raises:
        ConfigError: when float16 does not hold one of them.
    """
    # One that is too large becomes infinite, which it was not.
    with np.errstate(over="ignore"):
        halves = numbers.astype("<f2")
    if not np.array_equal(halves.astype(np.float32), numbers):
        lost = numbers[halves.astype(np.float32) != numbers][0]
        raise ConfigError(
            f"a scale, or its product with a zero point, is {lost:.9g}, which float16 does not hold; quantize with "
            "scheme.weights.scales: float16"
        )
    return halves[..., None].view(np.uint8)


def _nibbles(codes: NDArray[np.integer]) -> Bytes:
    """Two codes to a byte, ``[..., n]`` -> ``[..., n / 2]``: the first half of a block low, the second high."""
    low, high = np.split(codes.astype(np.uint8), 2, axis=-1)
    found: Bytes = np.bitwise_or(low, high << 4, dtype=np.uint8)
    return found


def _joined(*parts: Bytes) -> Bytes:
    """The parts of each block one after another, ``[out, blocks, bytes]`` each -> ``[out, bytes]``."""
    together = np.concatenate(parts, axis=-1)
    return together.reshape(len(together), -1)
