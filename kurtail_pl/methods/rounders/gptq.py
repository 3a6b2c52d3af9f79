"""GPTQ (arXiv 2210.17323) and what goes round it: GPTAQ, FOEM, refinement."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.gptq import Settings, gptq
from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.rounder import Moments, Needs, Rounder


@dataclass(frozen=True)
class GPTQ(Settings, Rounder):
    """Column after column, each making up for what those before it lost; see `maths.gptq.Settings`."""

    label = "gptq"

    def __post_init__(self) -> None:
        Rounder.__post_init__(self)
        Settings.__post_init__(self)

    def sentence(self) -> str:
        """With its correction and rounds."""
        extra = {"gptaq": " with GPTAQ's correction", "foem": " with FOEM's correction", None: ""}[self.correction]
        rounds = f", {self.refine} rounds of coordinate descent" if self.refine else ""
        return f"rounded by GPTQ{extra}{rounds}"

    @property
    def needs(self) -> Needs:
        """GPTAQ asks for the float model's inputs too."""
        return Needs.INPUTS | Needs.FLOAT_INPUTS if self.correction == "gptaq" else Needs.INPUTS

    def require(self, weights: Format) -> None:
        """Refinement moves codes by whole steps."""
        if self.refine and not weights.even:
            raise ConfigError(
                f"rounder.refine is {self.refine} and the levels of {type(weights).__name__} are not evenly spaced; "
                "write refine: 0"
            )

    def codes(self, weight: Tensor, weights: Format, moments: Moments) -> Quantized:
        """On the format's own grid."""
        assert moments.hessian is not None
        return gptq(weight, moments.hessian, weights.grid(weight), weights, self, moments.cross)

    def cost(self, sizes: Sizes) -> Cost:
        """The Hessian's factor, and its float32 copy; GPTAQ has three products more."""
        copies = 5 if self.refine else 3 if self.correction == "foem" else 2
        return Cost(copies=copies, doubles=5 if self.correction == "gptaq" else 2, singles=1)
