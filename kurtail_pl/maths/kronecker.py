"""Invertible Kronecker products: maps of a model's channels that cost little, and need not be orthogonal.

FlatQuant (arXiv 2410.09426, section 3.2) puts one before each quantizer, and its inverse into the weight behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kronecker:
    """An invertible matrix of order a * b, ``kron(left, right)``, that acts on rows.

    Attributes:
        left: ``[a, a]``.
        right: ``[b, b]``.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The whole matrix, ``[a * b, a * b]``."""
        return torch.kron(self.left, self.right)

    @property
    def multiplications(self) -> int:
        """Of one row, by a product with each factor."""
        a, b = len(self.left), len(self.right)
        return a * b * (a + b)

    def inverse_transposed(self) -> Kronecker:
        """The inverse of the transpose, in float64: a weight times it undoes the map, ``(x P) (W P^-T)^T = x W^T``."""
        return Kronecker(*(torch.linalg.inv(factor.double()).mT for factor in (self.left, self.right)))

    def stored(self) -> Kronecker:
        """As a file has it, float32."""
        return Kronecker(self.left.float(), self.right.float())

    def condition(self) -> float:
        """Largest singular value over the smallest: at most by so much an error before the map grows behind it."""
        return float(math.prod(torch.linalg.cond(factor.double()).item() for factor in (self.left, self.right)))


def kronecker_transform(x: Tensor, kronecker: Kronecker) -> Tensor:
    """Multiply the rows of x by ``kron(left, right)`` without building it; differentiable in all.

    A row, reshaped to X ``[a, b]``, becomes ``left.T @ X @ right``.

    Args:
        x: ``[..., a * b]``.
        kronecker: is cast to the type and device of x.

    Returns:
        ``x @ kronecker.dense()``, ``[..., a * b]``.
    """
    left, right = kronecker.left.to(x), kronecker.right.to(x)
    # Products of other layouts have other last bits: keys out of a cache would differ from those that were evaluated.
    by_right = x.contiguous().view(*x.shape[:-1], len(left), len(right)) @ right
    # With the small matrix on the right torch runs one large product instead of one small product per row.
    return (by_right.mT @ left).mT.reshape(x.shape)


def nearest_sizes(n: int) -> tuple[int, int]:
    """Choose orders a <= b of two factors, as near to each other as ``a * b == n`` allows: a + b products a number.

    >>> nearest_sizes(4096), nearest_sizes(11008), nearest_sizes(576)
    ((64, 64), (86, 128), (24, 24))
    """
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a
