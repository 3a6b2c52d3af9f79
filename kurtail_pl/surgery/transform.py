"""Transforms: changes of a decoder layer's weights that leave the model's output as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.equip import equip_layer, online_rotations
from kurtail_pl.surgery.rotations import Rotations


class Transform(ABC):
    """One step of fusion. After it the layer writes what it wrote before, or that turned by R1.

    Attributes:
        sentence: what it does, for the gate's error.
        turns: whether the layer reads and writes the residual stream turned by R1 from then on.
    """

    sentence: ClassVar[str]
    turns: ClassVar[bool] = False

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """While the original layer runs on a text: look at what it computes, if that is of use."""
        yield

    @abstractmethod
    def fold(self, layer: nn.Module, index: int) -> bool:
        """Change the weights of one decoder layer, float64, in place; returns whether it did."""


@dataclass(frozen=True)
class FoldNorms(Transform):
    """The norms' weights go into the linears that read them, where R1 in the weights or scales ask for it.

    An R1 of block inputs acts behind the norms, which keep their weights.
    """

    architecture: Architecture
    wanted: bool

    sentence = "folding the norms"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """Both norms."""
        if self.wanted:
            folding.fold_layer_norms(layer, self.architecture)
        return self.wanted


@dataclass(frozen=True)
class RotateResidual(Transform):
    """R1 into all that reads or writes the residual stream."""

    architecture: Architecture
    rotation: Tensor | None

    sentence = "rotating the residual stream (R1)"
    turns = True

    def fold(self, layer: nn.Module, index: int) -> bool:
        """After the norms."""
        if self.rotation is not None:
            folding.rotate_residual(layer, self.architecture, self.rotation)
        return self.rotation is not None


@dataclass(frozen=True)
class RotateValues(Transform):
    """R2 into `v_proj` and `o_proj`; ``[layers, ...]``."""

    architecture: Architecture
    rotation: Tensor | None

    sentence = "rotating the values (R2)"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """The layer's own."""
        if self.rotation is not None:
            folding.rotate_values(layer, self.architecture, self.rotation[index])
        return self.rotation is not None


@dataclass(frozen=True)
class FlipHidden(Transform):
    """Signs of an R5 that has none at run time: into the rows of `up_proj`, and the columns of `down_proj`."""

    architecture: Architecture
    rotations: Rotations

    sentence = "signs of the MLP's channels (R5)"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """Of every gated MLP; multiplying by 1 and -1 is exact."""
        return folding.flip_hidden(layer, self.architecture, self.rotations)


@dataclass(frozen=True)
class RotateOnline(Transform):
    """R3, R4, R5 and block inputs' R1 at run time, their inverses into the weights; the layer gets its own modules."""

    architecture: Architecture
    rotations: Rotations
    head_dim: int

    sentence = "rotating online"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """The last step: nothing knows its modules after it."""
        for name, factors in online_rotations(layer, self.architecture, self.rotations).items():
            folding.absorb_online(folding.linear_of(layer, name), factors)
        equip_layer(layer, self.architecture, FLOAT, self.rotations, self.head_dim)
        return True
