"""What formats of weights are in the layout of compressed-tensors: one function for each that has a form there."""

from __future__ import annotations

from functools import singledispatch

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import FloatZero, Format, Uniform


@singledispatch
def integers_of(weights: Format) -> Quantizer | None:
    """The integers that ``pack-quantized`` holds; None for a format that has no such form."""
    return None


@integers_of.register
def _(weights: Uniform) -> Quantizer:
    return weights.quantizer


@integers_of.register
def _(weights: FloatZero) -> None:
    return None
