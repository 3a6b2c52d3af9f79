"""What formats of weights are in ONNX: one function for each, and a refusal for the others."""

from __future__ import annotations

from functools import singledispatch

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import FloatZero, Format, Uniform


@singledispatch
def integers_of(weights: Format) -> Quantizer:
    """The integers that DequantizeLinear takes; raises ConfigError for a format that has no such form."""
    raise _no_form(weights)


def _no_form(weights: Format) -> ConfigError:
    return ConfigError(
        f"the weights are {weights.sentence()}, and ONNX dequantizes evenly spaced integers with integer zero points "
        "alone: quantize to those to export, or use the artefact with kurtail_pl.load"
    )


@integers_of.register
def _(weights: Uniform) -> Quantizer:
    return weights.quantizer


@integers_of.register
def _(weights: FloatZero) -> Quantizer:
    raise _no_form(weights)
