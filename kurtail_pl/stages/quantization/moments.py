"""Sums of products of inputs over tokens: the Hessians that weights are solved by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from kurtail_pl.maths.products import tf32_products
from kurtail_pl.methods import Moments
from kurtail_pl.surgery.linear import QuantizedLinear

FLOAT64_WIDTH = 8192
"""Hessians up to this width are float64, 0.5 GB at most; a wider one in float32 is still factored safely, by the square
root of its condition (`maths.gptq`)."""
BLOCKS = 8
"""A sum of symmetric products is made in so many blocks of rows, nine sixteenths of the whole product."""
SMALLEST_BLOCK = 256
"""Narrower ones make products that a processor is slower at."""


def moments_of(
    linear: QuantizedLinear,
    inputs: Iterable[Tensor],
    wanted: Iterable[Tensor] | None,
    counts: Sequence[Tensor] | None,
    crossed: bool,
    device: torch.device,
) -> Moments:
    """Sums over the tokens of all windows, of what a linear's weight multiplies.

    Args:
        linear: rotates, centres and quantizes its inputs.
        inputs: of the linear, window by window, ``[1, tokens, in]``.
        wanted: those of the float model; None where it does not run beside.
        counts: what each token of each window counts for, ``[tokens]``; None for 1.
        crossed: make also the product of what the weight should multiply with what it does.
        device: where the sums are.
    """
    hessian = _empty_product(linear.in_features, device)
    cross = _empty_product(linear.in_features, device) if crossed else None
    blocks = _upper_half(linear.in_features)
    windows = zip(inputs, repeat(None) if wanted is None else wanted, strict=wanted is not None)
    for index, (x, exact) in enumerate(windows):
        rows = linear.prepare(x).flatten(0, -2)
        counted = rows if counts is None else rows * counts[index].unsqueeze(-1)
        for block, rest in blocks:
            _add_product(hessian[block, rest], rows[:, block], counted[:, rest])
        if cross is not None:
            _add_product(cross, linear.turn(x if exact is None else exact).flatten(0, -2), counted)
    for block, _ in blocks:
        below = slice(block.stop, None)
        hessian[below, block] = hessian[block, below].T
    return Moments(hessian, cross)


def _upper_half(width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks that cover the upper half of a square: a symmetric product needs no others."""
    size = max(SMALLEST_BLOCK, width // BLOCKS)
    return [(slice(start, start + size), slice(start, None)) for start in range(0, width, size)]


def _empty_product(width: int, device: torch.device) -> Tensor:
    """Zeros ``[width, width]`` to add products to."""
    dtype = torch.float64 if width <= FLOAT64_WIDTH else torch.float32
    return torch.zeros(width, width, dtype=dtype, device=device)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` of rows of tokens, float32 products, to a sum in its own type."""
    # No value of bfloat16 is rounded by them.
    with tf32_products(right.is_cuda and right.dtype == torch.bfloat16):
        left, right = left.float(), right.float()
        if total.dtype == torch.float32:
            total.addmm_(left.T, right)
        else:
            total += left.T @ right
