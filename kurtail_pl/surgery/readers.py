"""Linears that read the same inputs: the first of them maps and quantizes an input, the others take what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kurtail_pl.maths.quantizers import Quantized


class Read(NamedTuple):
    """An input as linears multiply it.

    Attributes:
        turned: rotated, mapped and centred, ``[..., in]``, as a side reads it.
        quantized: as the weight reads it: floats ``[..., in]``, or codes ``[rows, in]`` where integers are multiplied.
    """

    turned: Tensor
    quantized: Tensor | Quantized


class _Kept(NamedTuple):
    """What was made of an input, as it was then, by which settings, and how many still have to read it."""

    x: Tensor
    version: int
    settings: tuple[object, ...]
    read: Read
    left: int


class Readers:
    """So many linears that read the same inputs, maps and quantizers alike.

    What is made of an input is kept until all of them have read it, or another one comes. While gradients are wanted
    nothing is kept.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._kept: _Kept | None = None

    def read(self, x: Tensor, settings: tuple[object, ...], make: Callable[[], Read]) -> Read:
        """What is made of an input: by the first one that reads it, under the same settings, for all.

        Args:
            x: the input; one is told from another by what it is, not by its numbers.
            settings: by which it is made, equal where that is the same.
            make: makes it.
        """
        kept, version = self._kept, _version(x)
        if kept is not None and kept.x is x and kept.version == version and kept.settings == settings:
            self._keep(kept._replace(left=kept.left - 1))
            return kept.read
        read = make()
        floats = [each for each in (x, *read) if isinstance(each, Tensor)]
        learns = any(each.requires_grad for each in floats)
        self._keep(None if learns else _Kept(x, version, settings, read, self._count - 1))
        return read

    def _keep(self, kept: _Kept | None) -> None:
        self._kept = kept if kept is not None and kept.left else None


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; an inference tensor does not count that."""
    return 0 if x.is_inference() else x._version
