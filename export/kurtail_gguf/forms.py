"""What formats of weights are in a GGUF file: one function for each that has a form there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from torch import Tensor

from kurtail_gguf import blocks
from kurtail_gguf.blocks import BLOCK, Bytes
from kurtail_pl.methods import MXFP4, NVFP4, FloatZero, Format, Normal, Uniform

SETTING = "quantize with scheme.weights"


@dataclass(frozen=True)
class Form:
    """How a weight's codes are stored.

    Args:
        kind: type of the tensor.
        file_type: of a file that holds mostly these.
        block: inputs that must divide a row.
        pack: stored tensors of the artefact and the number of inputs to bytes ``[out, bytes]``.
        scale: name of a stored tensor with one more scale, for all of a weight; None without.
    """

    kind: Kind
    file_type: LlamaFileType
    block: int
    pack: Callable[[Mapping[str, Tensor], int], Bytes]
    scale: str | None = None


@singledispatch
def form_of(weights: Format) -> Form | str:
    """The form of a format, or why there is none, in a sentence that names the setting to change."""
    return f"the weights are {weights.sentence()}, which GGUF has no blocks for; {SETTING}.class_path: {_KNOWN}"


_KNOWN = "kurtail_pl.methods.Uniform, MXFP4 or NVFP4"


@form_of.register
def _(weights: Normal) -> str:
    return f"the weights are {weights.sentence()}, and GGUF has no such levels; {SETTING}.class_path: {_KNOWN}"


@form_of.register
def _(weights: FloatZero) -> str:
    return (
        f"the weights are {weights.sentence()}, which the float16 numbers of GGUF's blocks would round; {SETTING}: "
        "{class_path: kurtail_pl.methods.Uniform, init_args: {symmetric: false, scales: float16}}"
    )


@form_of.register
def _(weights: Uniform) -> Form | str:
    if weights.group_size is not None and weights.group_size % BLOCK:
        return (
            f"the weights have groups of {weights.group_size} and GGUF has blocks of {BLOCK}; {SETTING}.group_size: "
            f"null, or a multiple of {BLOCK}"
        )
    if not weights.symmetric and weights.bits > 4:
        return f"the weights are asymmetric in {weights.bits} bits and GGUF's blocks in 4; {SETTING}.symmetric: true"
    if weights.scales != "float16":
        return f"the weights have scales in {weights.scales} and GGUF's blocks in float16; {SETTING}.scales: float16"
    kind, file_type, pack = {
        (True, True): (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0, blocks.q4_0),
        (True, False): (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0, blocks.q8_0),
        (False, True): (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1, blocks.q4_1),
    }[weights.symmetric, weights.bits <= 4]
    return Form(kind, file_type, BLOCK, lambda tensors, columns: pack(weights.unpack(tensors, columns)))


@form_of.register
def _(weights: MXFP4) -> Form:
    def pack(tensors: Mapping[str, Tensor], columns: int) -> Bytes:
        return blocks.mxfp4(weights.unpacked(tensors["codes"], columns), tensors["scale"])

    return Form(Kind.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE, BLOCK, pack)


@form_of.register
def _(weights: NVFP4) -> Form:
    def pack(tensors: Mapping[str, Tensor], columns: int) -> Bytes:
        return blocks.nvfp4(weights.unpacked(tensors["codes"], columns), tensors["blocks"])

    return Form(Kind.NVFP4, LlamaFileType.MOSTLY_NVFP4, blocks.NVFP4_BLOCK, pack, scale="tensor_scale")


def float_form() -> Form:
    """Of weights that were not quantized: ``weight`` in float16."""

    def pack(tensors: Mapping[str, Tensor], columns: int) -> Bytes:
        return np.asarray(tensors["weight"].half()).view(np.uint8)

    return Form(Kind.F16, LlamaFileType.MOSTLY_F16, 1, pack)
