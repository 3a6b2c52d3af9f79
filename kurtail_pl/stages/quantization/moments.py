"""Sums of products of inputs over tokens: the Hessians that weights are solved by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOAT64_WIDTH = 8192
"""Hessians up to this width are float64, 0.5 GB at most; a wider one in float32 is still factored safely, by the square
root of its condition (`maths.gptq`)."""


def empty_product(width: int, device: torch.device) -> Tensor:
    """Zeros ``[width, width]`` to add products to."""
    dtype = torch.float64 if width <= FLOAT64_WIDTH else torch.float32
    return torch.zeros(width, width, dtype=dtype, device=device)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` of ``[tokens, in]``, float32 products, to a sum ``[in, in]`` in its own type."""
    with _exact_products(right.dtype):
        left, right = left.float(), right.float()
        if total.dtype == torch.float32:
            total.addmm_(left.T, right)
        else:
            total += left.T @ right


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let CUDA multiply bfloat16 values, held as float32, by its fast TF32 units, which round none of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
