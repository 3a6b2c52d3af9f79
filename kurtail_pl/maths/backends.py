"""The power-of-two part of a Hadamard transform: a CUDA kernel where one is installed, a matrix product elsewhere."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

_KERNEL_PACKAGE = "fast_hadamard_transform"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL_SIZES = tuple(2**power for power in range(1, 16))  # The package silently zero-pads sizes it does not know.


def apply_right(x: Tensor, right: Tensor) -> Tensor:
    """Multiply the last dimension of x by a signed Sylvester matrix.

    On CUDA the optional package `fast_hadamard_transform` does the work in O(b log b) per row, with its scale in
    float32. The matrix itself is not checked: the kernel is right only for a signed Sylvester matrix.

    Args:
        x: `[..., b]`, real floating point.
        right: `[b, b]` on the device and in the dtype of x; `diag(r) S diag(c) / sqrt(b)` with S the Sylvester matrix
            of order b and r, c any signs.

    Returns:
        `x @ right`, `[..., b]`.
    """
    size = right.shape[-1]
    if x.is_cuda and x.dtype in _KERNEL_DTYPES and size in _KERNEL_SIZES:
        kernel = _fast_hadamard()
        if kernel is not None:
            rows, columns = sylvester_signs(right)
            return kernel(x * rows, size**-0.5) * columns
    return x @ right


def sylvester_signs(right: Tensor) -> tuple[Tensor, Tensor]:
    """Read the signs off a signed Sylvester matrix, whose first row and column are constant before the signs.

    Args:
        right: `[b, b]`, `diag(r) S diag(c) / sqrt(b)`.

    Returns:
        The row signs r and the column signs c, `[b]` each; the sign common to both is counted in r.
    """
    rows = right[:, 0].sign()
    return rows, right[0].sign() * rows[0]


@functools.cache
def _fast_hadamard() -> Callable[[Tensor, float], Tensor] | None:
    """Return the transform `(x, scale) -> scale * x S` of the optional package, or None when it is not installed."""
    if importlib.util.find_spec(_KERNEL_PACKAGE) is None:
        return None
    transform: Callable[[Tensor, float], Tensor] = importlib.import_module(_KERNEL_PACKAGE).hadamard_transform
    return transform
