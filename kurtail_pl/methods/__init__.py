"""Methods: values that a recipe is made of. Each file holds one, and nothing else names it.

A new one is a frozen dataclass in a file of its own, under the seam that it belongs to, imported here.
"""

from kurtail_pl.methods.format import Format
from kurtail_pl.methods.formats.fp4 import MXFP4, NVFP4
from kurtail_pl.methods.formats.normal import Normal
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.rounder import Moments, Needs, Rounder
from kurtail_pl.methods.rounders.gptq import GPTQ
from kurtail_pl.methods.rounders.hqq import HQQ, FloatZero
from kurtail_pl.methods.rounders.rtn import RTN

__all__ = [
    "GPTQ",
    "HQQ",
    "MXFP4",
    "NVFP4",
    "RTN",
    "FloatZero",
    "Format",
    "Moments",
    "Needs",
    "Normal",
    "Rounder",
    "Uniform",
    "default_format",
    "default_rounder",
]


def default_format() -> Format:
    """How weights are stored when nobody says otherwise: 4-bit integers, a scale for each output channel."""
    return Uniform()


def default_rounder() -> Rounder:
    """How weights are rounded when nobody says otherwise."""
    return GPTQ()
