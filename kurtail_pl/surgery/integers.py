"""Products of integers: what codes of inputs and of weights give, exact, where the processor has units for them.

A simulation multiplies the floats that codes stand for. Where a token has one scale and an output channel one, the
codes themselves can be multiplied, ``(c - z) W^T`` in int32 without any rounding, and the two scales go on afterwards.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantized, Quantizer
from kurtail_pl.methods import Format


class IntegerWeight(NamedTuple):
    """Codes of a weight as a product reads them.

    Attributes:
        codes: ``[in, out]`` int8.
        sums: of the codes of each output, ``[out]`` int32; None where inputs have no zero points.
        scale: ``[out]``.
    """

    codes: Tensor
    sums: Tensor | None
    scale: Tensor


@cache
def processor_multiplies_integers() -> bool:
    """Whether products of int8 are faster than those of floats here: VNNI, which processors have from 2019 on."""
    return bool(torch.cpu._is_vnni_supported()) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def multiplies(activations: Quantizer | None, weights: Format | None) -> bool:
    """Whether both have one scale for all channels, evenly spaced codes, and no clip that learns."""
    if activations is None or activations.group_size is not None or type(activations.clip) is not Clip:
        return False
    integers = None if weights is None else weights.integers
    return integers is not None and integers.symmetric and integers.group_size is None


def integer_weight(quantized: Quantized, activations: Quantizer) -> IntegerWeight:
    """Of codes ``[out, in]`` and scales ``[out, 1]``, for inputs of a quantizer."""
    codes, (scale, _) = quantized
    codes = codes.to(torch.int8)
    sums = None if activations.symmetric else codes.sum(-1, dtype=torch.int32)
    return IntegerWeight(codes.T, sums, scale.flatten())


def integer_product(quantized: Quantized, activations: Quantizer, weight: IntegerWeight) -> Tensor:
    """What a linear gives for codes ``[rows, in]`` of its inputs, ``[rows, out]`` in the type of their scales or wider.

    Codes from 0 on are moved by half their range, as int8 needs them for 8 bits, and zero points with them.
    """
    codes, (scale, zero_point) = quantized
    half = 0 if activations.symmetric else 1 << (activations.bits - 1)
    products = torch._int_mm((codes - half).to(torch.int8) if half else codes, weight.codes)
    if zero_point is not None:
        assert weight.sums is not None
        products -= (zero_point - half).to(torch.int32) * weight.sums
    return products.to(torch.promote_types(scale.dtype, torch.float32)).mul_(scale).mul_(weight.scale)
