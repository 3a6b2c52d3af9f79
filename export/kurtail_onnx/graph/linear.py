"""A linear of the model: float weights, or codes in one of three forms.

``qdq`` is standard ONNX, codes ``[in, out]`` behind a DequantizeLinear, which ONNX Runtime turns into its MatMulNBits
kernel; ``matmulnbits`` writes that kernel's node itself; ``integer`` multiplies int8 codes of weights and activations.
In double the first form is arithmetic: DequantizeLinear gives none.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import pad

from kurtail_onnx.forms import scales_of, weight_integers_of
from kurtail_onnx.graph.activations import CODE_TYPES, IntegerRows
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes, values_of
from kurtail_onnx.graph.weights import float_weight, initializer
from kurtail_onnx.settings import WeightForm
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.packing import unpack_codes
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.surgery.linear import QuantizedLinear

KERNEL_DOMAIN = "com.microsoft"
KERNEL_BLOCK = 32
"""Block of the MatMulNBits kernel; the scale of a longer run is repeated for each of its blocks."""
EXACT_LEVEL = 1
"""Accuracy level of that kernel that multiplies float32 activations; level 4 rounds them to int8 first."""


def linear(g: GraphBuilder, source: Source, name: str, x: ir.Value | IntegerRows, form: WeightForm) -> ir.Value:
    """Multiply by a linear of the model and add its bias.

    Args:
        g: the graph.
        source: the artefact.
        name: of the linear in the whole model.
        x: ``[batch, tokens, in]``, or integer rows where weights and form are integer.
        form: of quantized weights; float ones are a plain MatMul.
    """
    module = source.linear(name)
    with g.scope(name.rsplit(".", 1)[-1]):
        y = _product(g, _Weight(source, name, module), x, form)
        if module.bias is None:
            return y
        return g.op("Add", y, float_weight(g, source, f"{name}.bias", (module.out_features,)))


class _Weight:
    """A linear's weight in the artefact: shapes from its module, codes and scales read when written."""

    def __init__(self, source: Source, name: str, module: QuantizedLinear) -> None:
        self.source, self.name = source, name
        self.rows, self.columns = module.out_features, module.in_features
        self.format, self.quantizer = module.weights, weight_integers_of(module.weights)

    @property
    def group(self) -> int:
        """Input channels that share a scale."""
        return (self.quantizer and self.quantizer.group_size) or self.columns

    @property
    def groups(self) -> int:
        """Scales of an output channel."""
        return self.columns // self.group

    def codes(self) -> Tensor:
        """``[out, in]``, int8 or uint8."""
        assert self.quantizer is not None
        codes = self.source.tensor(f"{self.name}.codes")
        packed = codes.shape[-1] != self.columns
        return unpack_codes(codes, self.quantizer.symmetric) if packed else codes

    def scale(self) -> Tensor:
        """``[out, groups]``."""
        assert self.format is not None
        return scales_of(self.format, lambda tensor: self.source.tensor(f"{self.name}.{tensor}"))

    def zero_point(self) -> Tensor:
        """``[out, groups]`` uint8."""
        return self.source.tensor(f"{self.name}.zero_point")


def _product(g: GraphBuilder, weight: _Weight, x: ir.Value | IntegerRows, form: WeightForm) -> ir.Value:
    if isinstance(x, IntegerRows):
        return _integer_product(g, weight, x)
    if weight.quantizer is None:
        shape = (weight.rows, weight.columns)
        return g.op("MatMul", x, float_weight(g, weight.source, f"{weight.name}.weight", shape, transposed=True))
    if form == "matmulnbits":
        return _kernel_product(g, weight, weight.quantizer, x)
    if g.double:
        return _double_product(g, weight, weight.quantizer, x)
    return _dequantized_product(g, weight, weight.quantizer, x)


def _transposed_codes(g: GraphBuilder, weight: _Weight, dtype: ir.DataType) -> ir.Value:
    return initializer(g, f"{weight.name}.codes", dtype, (weight.columns, weight.rows), lambda: weight.codes().mT)


def _dequantized_product(g: GraphBuilder, weight: _Weight, quantizer: Quantizer, x: ir.Value) -> ir.Value:
    """``MatMul(x, DequantizeLinear(codes [in, out]))``: no other arrangement is fused."""
    dtype = CODE_TYPES[quantizer.bits, quantizer.symmetric]
    grouped = quantizer.group_size is not None
    shape = (weight.groups, weight.rows) if grouped else (weight.rows,)

    def by_group(tensor: Tensor) -> Tensor:
        return tensor.mT if grouped else tensor[:, 0]

    inputs = [
        _transposed_codes(g, weight, dtype),
        initializer(g, f"{weight.name}.scale", g.dtype, shape, lambda: by_group(weight.scale())),
    ]
    if not quantizer.symmetric:
        name = f"{weight.name}.zero_point"
        inputs.append(initializer(g, name, dtype, shape, lambda: by_group(weight.zero_point())))
    if grouped:
        dense = g.op("DequantizeLinear", *inputs, name="weight_dq", axis=0, block_size=weight.group)
    else:
        dense = g.op("DequantizeLinear", *inputs, name="weight_dq", axis=1)
    return g.op("MatMul", x, dense)


def _double_product(g: GraphBuilder, weight: _Weight, quantizer: Quantizer, x: ir.Value) -> ir.Value:
    """``MatMul(x, (codes - zero point) scale)`` of codes that are cast."""
    codes = g.cast(_transposed_codes(g, weight, CODE_TYPES[quantizer.bits, quantizer.symmetric]), g.dtype)
    each = (weight.groups, 1, weight.rows)
    scale = initializer(g, f"{weight.name}.scale", g.dtype, each, lambda: weight.scale().mT)
    zero_point = None
    if not quantizer.symmetric:
        zero_point = initializer(g, f"{weight.name}.zero_point", g.dtype, each, lambda: weight.zero_point().mT)
    with g.scope("weight_dq"):
        grouped = g.reshape(codes, weight.groups, weight.group, weight.rows)
        dense = g.reshape(values_of(g, grouped, GridNodes(scale, zero_point)), weight.columns, weight.rows)
    return g.op("MatMul", x, dense)


def _integer_product(g: GraphBuilder, weight: _Weight, x: IntegerRows) -> ir.Value:
    """``codes codes^T`` in int32, then the token's scale and the channel's."""
    assert weight.quantizer is not None
    codes = _transposed_codes(g, weight, CODE_TYPES[weight.quantizer.bits, True])
    if codes.dtype != ir.DataType.INT8:
        codes = g.cast(codes, ir.DataType.INT8)
    product = g.cast(g.op("MatMulInteger", x.codes, codes), g.dtype)
    scale = initializer(g, f"{weight.name}.scale", g.dtype, (weight.rows,), lambda: weight.scale()[:, 0])
    product = g.op("Mul", g.op("Mul", product, x.scale), scale)
    return g.reshape(product, 1, -1, weight.rows) if x.shape is None else g.op("Reshape", product, x.shape)


def _kernel_product(g: GraphBuilder, weight: _Weight, quantizer: Quantizer, x: ir.Value) -> ir.Value:
    """ONNX Runtime's MatMulNBits: codes ``[out, blocks, block]`` from zero up, one scale a block."""
    block = KERNEL_BLOCK if weight.group % KERNEL_BLOCK == 0 or weight.groups == 1 else weight.group
    blocks = -(-weight.columns // block)
    offset = -quantizer.code_range[0]

    def blocked_codes() -> Tensor:
        codes = (weight.codes().to(torch.int16) + offset).to(torch.uint8)
        codes = pad(codes, (0, blocks * block - weight.columns), value=offset)
        return _nibbles(codes) if quantizer.bits == 4 else codes

    def each_block(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(-(-blocks // weight.groups), dim=1)

    per_block = block // 2 if quantizer.bits == 4 else block
    inputs = [
        initializer(
            g, f"{weight.name}.codes", ir.DataType.UINT8, (weight.rows, blocks, per_block),
            lambda: blocked_codes().view(weight.rows, blocks, per_block),
        ),
        initializer(
            g, f"{weight.name}.scale", g.dtype, (weight.rows * blocks,), lambda: each_block(weight.scale()).flatten()
        ),
    ]  # fmt: skip
    if not quantizer.symmetric:
        packed = quantizer.bits == 4
        width = -(-blocks // 2) if packed else blocks

        def zero_points() -> Tensor:
            zeros = each_block(weight.zero_point())
            return (_nibbles(pad(zeros, (0, blocks % 2))) if packed else zeros).flatten()

        name = f"{weight.name}.zero_point"
        inputs.append(initializer(g, name, ir.DataType.UINT8, (weight.rows * width,), zero_points))
    return g.op(
        "MatMulNBits", x, *inputs, domain=KERNEL_DOMAIN, K=weight.columns, N=weight.rows, bits=quantizer.bits,
        block_size=block, accuracy_level=EXACT_LEVEL,
    )  # fmt: skip


def _nibbles(codes: Tensor) -> Tensor:
    """Neighbours of the last dimension two to a byte, the first in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
