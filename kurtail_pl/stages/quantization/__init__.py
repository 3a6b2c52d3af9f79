"""From a fused model to an artefact: weights to codes, layer by layer."""

from kurtail_pl.stages.quantization.spec import QuantizeSpec as QuantizeSpec
from kurtail_pl.stages.quantization.stage import quantize as quantize
