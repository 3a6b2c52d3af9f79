"""Which products of float32 matrices may use a GPU's TF32 units: ten bits of mantissa, sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let CUDA multiply float32 matrices by its TF32 units within the block, or keep it from that.

    They are several times as fast, and round both factors to TF32; values of bfloat16 are not changed by that. Ask for
    them on CUDA alone: some CPUs round too.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
