"""Rounders: a weight and what is known of its inputs, to codes of a format."""

from __future__ import annotations

from abc import abstractmethod
from enum import Flag, auto
from typing import NamedTuple

from torch import Tensor

from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.method import Method


class Needs(Flag):
    """What a rounder has to be given beside the weight."""

    NOTHING = 0
    INPUTS = auto()
    """Moments of the linear's inputs."""
    FLOAT_INPUTS = auto()
    """Products of them with the inputs that it has in the float model."""


class Moments(NamedTuple):
    """Sums over tokens: ``Y^T Y`` of what a weight multiplies, and ``X^T Y`` with X what it should multiply.

    That is what it multiplies in the float model or, where this does not run beside, Y before its quantizer. Both
    ``[in, in]``, float64, or float32 where that would be the largest thing in memory.
    """

    hessian: Tensor | None
    cross: Tensor | None


class Rounder(Method):
    """Turns a weight into codes."""

    @property
    def needs(self) -> Needs:
        """What `codes` asks for."""
        return Needs.NOTHING

    def require(self, weights: Format) -> None:
        """Raise ConfigError when it cannot round to a format."""

    @abstractmethod
    def codes(self, weight: Tensor, weights: Format, moments: Moments) -> Quantized:
        """Codes of a weight ``[out, in]``.

        Raises:
            torch.linalg.LinAlgError: when the Hessian is not positive definite: the weight is then rounded to nearest.
        """
