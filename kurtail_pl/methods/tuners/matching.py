"""Weights matched to their quantized inputs before they are rounded: the first step of Qronos (arXiv 2505.11695)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.matching import matched
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.rounder import Moments, Needs, Rounder
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import WeightTuner


@dataclass(frozen=True)
class Matching(WeightTuner):
    """Changes each weight by least squares, so that its product with quantized inputs is nearest to the float one.

    Args:
        damping: relative to the mean of the Hessian's diagonal, and added to it.

    Raises:
        ConfigError: when it is not positive.
    """

    damping: float = 0.01

    label = "matched"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"matching.damping is {self.damping}; give a positive number, usually 0.01")

    def sentence(self) -> str:
        """What it makes up for."""
        return "changed first, to make up for the rounding of their inputs"

    def cost(self, sizes: Sizes) -> Cost:
        """Two products, a factor and what is solved for."""
        return Cost(copies=2, doubles=4)

    def require(self, scheme: Scheme, quantized_activations: bool, rounder: Rounder) -> None:
        """Raise ConfigError where inputs are not quantized, or the rounder makes up for that by itself."""
        if not (quantized_activations and scheme.activations):
            raise ConfigError(
                "matching is given; weights are matched to quantized inputs: set quantized_activations: true and give "
                "scheme.activations"
            )
        if Needs.FLOAT_INPUTS in rounder.needs:
            raise ConfigError(
                f"matching is given and the weights are {rounder.sentence()}; both make up for the same loss: leave "
                "one out"
            )

    def tuned(self, weight: Tensor, moments: Moments) -> Tensor:
        """By least squares.

        Raises:
            torch.linalg.LinAlgError: when the damped Hessian is not positive definite.
        """
        assert moments.hessian is not None
        assert moments.cross is not None
        return matched(weight, moments.hessian, moments.cross, self.damping)
