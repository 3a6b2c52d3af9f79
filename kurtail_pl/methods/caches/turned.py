"""Caches of runtimes that turn keys and values by a fixed matrix before they round them, and undo it afterwards."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.maths.hadamard import hadamard_matrix
from kurtail_pl.methods.cache import CacheFormat


class TurnedCache(CacheFormat):
    """Queries are turned like keys there, and what attention gives like values: scores and outputs stay what they are.

    Here keys and values are turned back instead, which gives the same but for the order of sums.
    """

    bits: ClassVar[int] = 4

    @property
    def name(self) -> str:
        """Bits of both."""
        return f"kv{self.bits}"

    @abstractmethod
    def key_basis(self, head_dim: int) -> Tensor:
        """What keys are turned by, orthogonal, ``[head_dim, head_dim]``, float64."""

    @abstractmethod
    def value_basis(self, head_dim: int) -> Tensor:
        """What values are turned by behind R2, the same."""

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """What turned keys or values ``[..., head_dim]`` in float32 are read as."""

    def kept_keys(self, keys: Tensor, first: Tensor | None) -> Tensor:
        """Turned, rounded, turned back."""
        return self._kept(keys, self.key_basis(keys.shape[-1]))

    def kept_values(self, values: Tensor, first: Tensor | None) -> Tensor:
        """Turned, rounded, turned back."""
        return self._kept(values, self.value_basis(values.shape[-1]))

    def without(self, part: str) -> CacheFormat | None:
        """They keep both alike."""
        return None

    def _kept(self, x: Tensor, basis: Tensor) -> Tensor:
        """No gradient passes the rounding, but for the straight-through one."""
        basis = basis.to(x.device, torch.float32)
        turned = x.float() @ basis
        kept = turned + (self.rounded(turned.detach()) - turned.detach())
        return (kept @ basis.T).to(x.dtype)


@cache
def block_hadamard(head_dim: int, block: int, seed: int | None = None) -> Tensor:
    """Sylvester's Hadamard matrix of unit rows for each block of channels, ``[head_dim, head_dim]``, float64.

    Args:
        head_dim: a multiple of the block.
        block: a power of two.
        seed: of random signs of the channels, the same in each block; None for none.
    """
    matrix = hadamard_matrix(block).double() / block**0.5
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1.0
        matrix = signs.double()[:, None] * matrix
    return torch.kron(torch.eye(head_dim // block, dtype=torch.float64), matrix)
