"""A sparse side: a few numbers of each row, with their places (SpQR, arXiv 2306.03078)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import half_or_float
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.methods.rounder import Moments
from kurtail_pl.methods.side import Side

INDEXED = 1 << 15
"""Columns that an int16 counts."""


@dataclass(frozen=True)
class Sparse(Side):
    """The largest numbers of each output channel, in 16 bits, and their places.

    The rest has zeros there. What is left of a group has a smaller range, in whose steps all of it is rounded. Each
    number takes 32 bits with its place, 48 where a linear has more than 32768 inputs.

    Args:
        share: of the numbers of a row; at least one.

    Raises:
        ConfigError: when it is not above 0 and below 1.
    """

    share: float = 0.005

    label = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ConfigError(f"side.share is {self.share}; give a number above 0 and below 1")

    def sentence(self) -> str:
        """The share."""
        return f"{100 * self.share:g} % of the weights in 16 bits, which read the inputs before they are rounded"

    def cost(self, sizes: Sizes) -> Cost:
        """Numbers and places on the disk."""
        return Cost(copies=2, disk=int(4 * self.share * sizes.stack), passes=20.0 * sizes.stack)

    def fitted(self, weight: Tensor, moments: Moments, lost: Callable[[Tensor], Tensor]) -> Tensors:
        """By magnitude."""
        columns = weight.shape[1]
        index = weight.abs().topk(self._count(columns), dim=1).indices.sort().values
        return {"index": index.to(_places(columns)), "value": half_or_float(weight.gather(1, index))}

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Index and value."""
        shape = rows, self._count(columns)
        return {"index": Buffer(shape, _places(columns)), "value": Buffer(shape, torch.float16)}

    def dense(self, tensors: Tensors, columns: int) -> Tensor:
        """Zeros but for its numbers."""
        return _scattered(tensors, columns, torch.float64)

    def product(self, x: Tensor, tensors: Tensors) -> Tensor:
        """By the dense matrix, which no kernel for sparse ones beats here."""
        return F.linear(x, _scattered(tensors, x.shape[-1], x.dtype))

    def _count(self, columns: int) -> int:
        """Numbers of a row."""
        return max(1, round(self.share * columns))


def _scattered(tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix ``[out, columns]``, in a type."""
    value = tensors["value"].to(dtype)
    return value.new_zeros(len(value), columns).scatter_(1, tensors["index"].long(), value)


def _places(columns: int) -> torch.dtype:
    return torch.int16 if columns <= INDEXED else torch.int32
