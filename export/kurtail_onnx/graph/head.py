"""The head: float, or codes of 8 bits in blocks of 32, by ONNX Runtime's kernel MatMulNBits.

At its accuracy level 4 the kernel rounds what it reads to 8 bits in blocks of 32, by their largest magnitude, and
multiplies integers, whatever the profile. At level 1 it has none for codes of 8 bits and expands them in each step.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import onnx_ir as ir
import torch
from torch import Tensor

from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.linear import KERNEL_BLOCK, KERNEL_DOMAIN
from kurtail_onnx.graph.norm import rms_norm
from kurtail_onnx.graph.step import Step
from kurtail_onnx.graph.weights import float_weight, initializer
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer, quantize
from kurtail_pl.surgery.families import number_of

ROUNDED = Quantizer(8, group_size=KERNEL_BLOCK)
"""Quantizer of the rounded head's weight."""
INTEGER_LEVEL = 4
"""Accuracy level of MatMulNBits that multiplies int8 by int8."""
ROWS = 4096
"""Rows of the weight that are rounded at once."""


class RoundedWeight(NamedTuple):
    """Codes ``[vocabulary, hidden]`` int8 and float32 scales ``[vocabulary, hidden / 32]``."""

    codes: Tensor
    scale: Tensor


def head(step: Step, hidden: ir.Value) -> ir.Value:
    """Logits ``[batch, tokens, vocabulary]``, float32 or wider, of the last layer's hidden states."""
    g, source, names = step.g, step.source, step.source.architecture
    with g.scope("model"):
        hidden = rms_norm(step, names.final_norm, hidden)
    with g.root_scope(*names.head.split(".")):
        product = _rounded_product if step.spec.head == "int8" else _float_product
        logits = product(g, source, hidden)
        return g.cast(g.times(logits, 1 / number_of(source.config, names.logits_divisor)), g.wide)


def weight_name(source: Source) -> str:
    """The tensor of the artefact that the head multiplies by."""
    names = source.architecture
    return f"{names.embedding if source.config.tie_word_embeddings else names.head}.weight"


def weight_shape(source: Source) -> tuple[int, int]:
    """Vocabulary and hidden size."""
    weight = cast(Tensor, source.model.get_submodule(source.architecture.head).weight)
    return weight.shape[0], weight.shape[1]


def rounded_weight(weight: Tensor) -> RoundedWeight:
    """Nearest codes of a weight ``[vocabulary, hidden]``, a few rows at a time."""
    parts = [quantize(rows.float(), ROUNDED) for rows in torch.split(weight, ROWS)]
    return RoundedWeight(torch.cat([part.codes for part in parts]), torch.cat([part.grid.scale for part in parts]))


def _float_product(g: GraphBuilder, source: Source, hidden: ir.Value) -> ir.Value:
    weight = float_weight(g, source, weight_name(source), weight_shape(source), transposed=True)
    return g.op("MatMul", hidden, weight)


def _rounded_product(g: GraphBuilder, source: Source, hidden: ir.Value) -> ir.Value:
    (rows, columns), name = weight_shape(source), f"{source.architecture.head}.weight"
    blocks = columns // KERNEL_BLOCK

    def rounded() -> RoundedWeight:
        return rounded_weight(source.tensor(weight_name(source)))

    codes = initializer(
        g, f"{name}.codes", ir.DataType.UINT8, (rows, blocks, KERNEL_BLOCK),
        lambda: (rounded().codes.to(torch.int16) - ROUNDED.code_range[0]).to(torch.uint8),
    )  # fmt: skip
    scale = initializer(g, f"{name}.scale", g.dtype, (rows * blocks,), lambda: rounded().scale)
    return g.op(
        "MatMulNBits", hidden, codes, scale, domain=KERNEL_DOMAIN, K=columns, N=rows, bits=ROUNDED.bits,
        block_size=KERNEL_BLOCK, accuracy_level=INTEGER_LEVEL,
    )  # fmt: skip
