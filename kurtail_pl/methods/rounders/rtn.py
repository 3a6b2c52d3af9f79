"""Round to nearest: each number by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.rounder import Moments, Rounder


@dataclass(frozen=True)
class RTN(Rounder):
    """Rounds each number to its nearest code, on the format's own grid; needs no text."""

    label = "rtn"

    def sentence(self) -> str:
        """In words."""
        return "rounded to nearest"

    def codes(self, weight: Tensor, weights: Format, moments: Moments) -> Quantized:
        """The format's nearest codes."""
        return weights.nearest(weight)
