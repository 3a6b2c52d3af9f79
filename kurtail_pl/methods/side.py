"""Sides: what a linear computes beside its quantized weight, from inputs that are not quantized."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from math import prod
from typing import ClassVar

from torch import Tensor

from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.methods.method import Method
from kurtail_pl.methods.rounder import Moments, Needs


class Side(Method):
    """A part S of a weight ``W = R + S`` that stays in floating point: ``y = Q(x) Q(R)^T + x S^T``.

    Linears that read the same inputs have one side, that of their weights one above the other, ``[out, in]``.

    Attributes:
        shared: its tensors that such linears have in common; each other one has a row for each output.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> Needs:
        """What `fitted` asks for beside the weight."""
        return Needs.NOTHING

    def require(self, widths: tuple[int, ...]) -> None:
        """Raise ConfigError, naming the setting, when linears that read these widths cannot have it."""

    @abstractmethod
    def fitted(self, weight: Tensor, moments: Moments, lost: Callable[[Tensor], Tensor]) -> Tensors:
        """The side of a weight ``[out, in]``, as it is stored.

        Args:
            weight: of all linears that read the same inputs.
            moments: of these inputs; without a Hessian where there is none that can be used.
            lost: what rounding takes from a rest ``R [out, in]``.

        Raises:
            torch.linalg.LinAlgError: when the Hessian is not positive definite: it is then fitted without.
        """

    @abstractmethod
    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """What `fitted` gives for a weight ``[rows, columns]``."""

    def multiplications(self, rows: int, columns: int) -> int:
        """Of one token by the side of a weight ``[rows, columns]``; here one for each float that is stored."""
        return sum(prod(b.shape) for b in self.buffers(rows, columns).values() if b.dtype.is_floating_point)

    @abstractmethod
    def dense(self, tensors: Tensors, columns: int) -> Tensor:
        """The matrix S, ``[out, columns]``, that it stands for, float64."""

    @abstractmethod
    def product(self, x: Tensor, tensors: Tensors) -> Tensor:
        """``x S^T``: ``[..., in]`` -> ``[..., out]``, in the type of x."""
