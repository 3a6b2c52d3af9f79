"""An artefact's tensors as the folder stores them: codes as they are, everything else in the model's type."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from torch import Tensor

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.surgery.layout import checkpoint_state, module_state
from kurtail_pl.surgery.linear import QuantizedLinear

ROWS = 2048
"""Of a weight, packed at a time: the library takes twelve bytes for each code meanwhile."""
UNUSED = ("input_scale", "input_zero_point")
"""Of the quantizer of a linear's inputs: what is left out where these stay float."""


def float_part(source: Source, *modules: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of modules without quantized linears, by their names in the whole model."""
    return {
        f"{module}.{name}": in_type(f"{module}.{name}", tensor, dtype)
        for module in modules
        for name, tensor in source.checkpoint.tensors_under(module).items()
    }


def layer_part(source: Source, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a decoder layer, by the names that checkpoints on the hub have."""
    prefix, layer = source.layer_name(index), source.layers[index]
    state = module_state(source.checkpoint.tensors_under(prefix), source.architecture)
    stored: dict[str, Tensor] = {}
    for name in source.architecture.linears(layer):
        linear = layer.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        for unused in UNUSED:
            state.pop(f"{name}.{unused}", None)
        quantized = quantized_weight(linear, name, state)
        stored |= packed(f"{prefix}.{name}", quantized, linear, dtype)
    stored |= {f"{prefix}.{name}": in_type(f"{prefix}.{name}", tensor, dtype) for name, tensor in state.items()}
    return checkpoint_state(stored, source.architecture)


def quantized_weight(linear: QuantizedLinear, name: str, state: dict[str, Tensor]) -> Quantized:
    """Codes and grid of a linear, taken out of its layer's state."""
    assert linear.weights is not None
    buffers = linear.weights.buffers(linear.out_features, linear.in_features)
    return linear.weights.unpack({key: state.pop(f"{name}.{key}") for key in buffers}, linear.in_features)


def packed(name: str, quantized: Quantized, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight ``[out, in]`` in the layout ``pack-quantized``.

    Returns:
        ``weight_packed`` int32 ``[out, in * bits / 32]``, the lowest bits first; ``weight_scale`` ``[out, groups]`` in
        the model's type; ``weight_shape``; with zero points ``weight_zero_point`` int32 ``[out * bits / 32, groups]``.

    Raises:
        ConfigError: when the type does not hold a scale exactly.
    """
    assert linear.weights is not None
    (codes, (scale, zero_point)), bits = quantized, linear.weights.bits
    tensors = {
        "weight_packed": torch.cat([pack_to_int32(signed(rows, bits), bits) for rows in torch.split(codes, ROWS)]),
        "weight_scale": exactly(f"{name}.scale", scale, dtype),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_to_int32(signed(zero_point, bits), bits, packed_dim=0)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes, or zero points, from 0 on as the library has them: from ``-2^(bits - 1)`` on; signed ones stay."""
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def exactly(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the model's type, which is the only one that vLLM reads them in."""
    rounded = scale.to(dtype)
    if not torch.equal(rounded.to(scale.dtype), scale):
        share = (rounded.to(scale.dtype) != scale).float().mean().item()
        raise ConfigError(
            f"{share:.0%} of the numbers of {name} would be rounded in {_name(dtype)}, the type in which vLLM reads "
            "scales, and the weights would be others: quantize with weights.scales: float16 and export with --to.dtype "
            "float16, or export with --to.dtype float32"
        )
    return rounded


def in_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float tensor rounded to the model's type; raises ConfigError when a value is beyond its range."""
    rounded = tensor.to(dtype)
    if not is_finite(rounded):
        largest = tensor.abs().max().item()
        raise ConfigError(
            f"{name} has values up to {largest:.3g}, which {_name(dtype)} does not hold; export with --to.dtype "
            "bfloat16 or float32"
        )
    return rounded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parts(source: Source, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """All tensors but those of transforms: the embedding, each decoder layer, the final norm and the head."""
    architecture = source.architecture
    yield float_part(source, architecture.embedding, dtype=dtype)
    for index in range(len(source.layers)):
        yield layer_part(source, index, dtype)
    yield float_part(source, architecture.final_norm, architecture.head, dtype=dtype)
