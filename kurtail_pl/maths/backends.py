"""The optional package fast-hadamard-transform: its CUDA kernel multiplies rows by Sylvester's matrix."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

_KERNEL_PACKAGE = "fast_hadamard_transform"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL_SIZES = tuple(2**power for power in range(1, 16))  # The package silently zero-pads sizes it does not know.

Transform = Callable[[Tensor, float], Tensor]
"""``(x, scale) -> scale * x S`` with Sylvester's matrix S of the order of x's last dimension, computed in float32."""


def fast_transform(x: Tensor, size: int) -> Transform | None:
    """The package's kernel for rows of a size; None where it is not installed, or takes no such rows."""
    taken = x.is_cuda and x.dtype in _KERNEL_DTYPES and size in _KERNEL_SIZES
    return _kernel() if taken else None


@functools.cache
def _kernel() -> Transform | None:
    if importlib.util.find_spec(_KERNEL_PACKAGE) is None:
        return None
    transform: Transform = importlib.import_module(_KERNEL_PACKAGE).hadamard_transform
    return transform
