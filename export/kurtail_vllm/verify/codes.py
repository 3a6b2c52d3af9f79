"""Every tensor of an export against the artefact's, read back by the library that other runtimes read with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
from torch import Tensor

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.surgery.layout import checkpoint_name, module_state
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_vllm.groups import place_of
from kurtail_vllm.tensors import UNUSED
from kurtail_vllm.verify.folder import Served


@dataclass
class Equal:
    """What was compared and found equal, bit for bit.

    Attributes:
        linears: with quantized weights.
        codes: of their weights.
        scales: with their zero points.
        floats: of everything else, rounded to the model's type.
    """

    linears: int = 0
    codes: int = 0
    scales: int = 0
    floats: int = 0


def compare_codes(source: Source, served: Served, dtype: torch.dtype) -> Equal:
    """Compare all tensors but those of transforms, a decoder layer at a time.

    Raises:
        CheckFailed: naming a tensor that differs, is missing, or is not the artefact's.
    """
    equal, seen = Equal(), set[str]()
    architecture = source.architecture
    for module in (architecture.embedding, architecture.final_norm, architecture.head):
        for name, tensor in source.checkpoint.tensors_under(module).items():
            seen.add(_compare_float(served, f"{module}.{name}", tensor, dtype, equal))
    for index, layer in enumerate(source.layers):
        prefix = source.layer_name(index)
        state = module_state(source.checkpoint.tensors_under(prefix), architecture)
        for name in architecture.linears(layer):
            linear = cast(QuantizedLinear, layer.get_submodule(name))
            assert linear.weights is not None
            buffers = linear.weights.buffers(linear.out_features, linear.in_features)
            stored = {key: state.pop(f"{name}.{key}") for key in buffers}
            quantized = linear.weights.unpack(stored, linear.in_features)
            place = place_of(f"{prefix}.{name}", architecture)
            seen |= _compare_linear(served, place, linear, quantized, equal)
        for name, tensor in state.items():
            if name.rpartition(".")[2] not in UNUSED:
                place = checkpoint_name(f"{prefix}.{name}", architecture)
                seen.add(_compare_float(served, place, tensor, dtype, equal))
    groups = tuple(f".{group}_input.weight" for group in served.transforms.config_groups)
    if more := [name for name in served.names if name not in seen and not name.endswith(groups or ("\0",))]:
        raise CheckFailed(f"the export has tensors that the artefact has not: {', '.join(sorted(more)[:5])}")
    return equal


def _compare_float(served: Served, name: str, tensor: Tensor, dtype: torch.dtype, equal: Equal) -> str:
    found = served.tensor(name)
    if found.dtype != dtype or not torch.equal(found, tensor.to(dtype)):
        raise CheckFailed(f"{name} of the export is not the artefact's in {dtype}")
    equal.floats += tensor.numel()
    return name


def _compare_linear(served: Served, name: str, linear: QuantizedLinear, quantized: Quantized, equal: Equal) -> set[str]:
    found, scheme = served.weight(name), served.scheme(name)
    (codes, (scale, zero_point)), arguments = quantized, scheme.weights
    assert arguments is not None
    assert linear.weights is not None
    offset = 0 if arguments.symmetric else 1 << (arguments.num_bits - 1)
    shape = torch.Size(found["weight_shape"].tolist())
    library = {"codes": unpack_from_int32(found["weight_packed"], arguments.num_bits, shape).int() + offset}
    ours = {"codes": codes.int(), "scale": scale}
    library["scale"] = found["weight_scale"].to(scale.dtype)
    if zero_point is not None:
        points = torch.Size((shape[0], scale.shape[-1]))
        unpacked = unpack_from_int32(found["weight_zero_point"], arguments.num_bits, points, packed_dim=0)
        library["zero_point"], ours["zero_point"] = unpacked.int() + offset, zero_point.int()
    # Its own product, of scales in the artefact's type.
    state = {**found, "weight_scale": library["scale"]}
    library["weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    ours["weight"] = linear.weights.values(quantized)
    for part, expected in ours.items():
        if not torch.equal(library[part], expected):
            raise CheckFailed(f"{part} of {name} in the export, read by compressed-tensors, is not the artefact's")
    equal.linears += 1
    equal.codes += codes.numel()
    equal.scales += scale.numel() + (0 if zero_point is None else zero_point.numel())
    return {f"{name}.{key}" for key in found}
