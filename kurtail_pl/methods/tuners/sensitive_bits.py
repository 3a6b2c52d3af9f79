"""Bits for each decoder layer by how much its weights' errors hurt: the best way to spend an average.

The linearity theorem (HIGGS, arXiv 2411.17525, Theorem 1): for small errors that are not correlated with the weights,
the logarithm of perplexity grows by ``sum_l alpha_l t_l^2``, with ``t_l^2`` the relative square error of layer l. The
normal grid's own error is ``t_l^2`` of its bits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.allocation import allocate
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.scheme import Scheme, with_bits
from kurtail_pl.methods.tuner import BitTuner

log = logging.getLogger(__name__)

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a layer may get."""


@dataclass(frozen=True)
class SensitiveBits(BitTuner):
    """Bits that make the growth of the loss least, by the linearity theorem.

    Args:
        average: bits of a weight over all layers, 2 to 8.

    Raises:
        ConfigError: for other averages.
    """

    average: float = 4.0

    label = "sensitive-bits"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(WIDTHS) <= self.average <= max(WIDTHS):
            raise ConfigError(f"bits.average is {self.average}; layers have {min(WIDTHS)} to {max(WIDTHS)} bits")

    def sentence(self) -> str:
        """Its average."""
        return f"bits of each layer by its measured sensitivity, {self.average:g} on average"

    def require(self, scheme: Scheme, quantized_activations: bool) -> None:
        """Their errors have to be known, and nobody else has chosen bits."""
        if scheme.weights is None or scheme.weights.relative_error() is None or scheme.layer_bits is not None:
            raise ConfigError(
                f"bits.average is {self.average}; bits are chosen where the error of a format is known: give "
                "scheme.weights with levels of the normal distribution, and scheme.layer_bits null"
            )

    def bits(self, weights: Format, sensitivities: Sequence[float]) -> list[int]:
        """Of every layer."""
        errors = torch.tensor([with_bits(weights, bits).relative_error() for bits in WIDTHS])
        bits = allocate(torch.tensor(sensitivities)[:, None] * errors, WIDTHS, self.average)
        log.info("bits of each layer's weights, %g on average: %s", self.average, " ".join(map(str, bits)))
        return bits
