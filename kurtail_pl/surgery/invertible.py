"""Learned maps of a decoder layer: where they stand, and its weights when they have them (FlatQuant).

A map of what linears read acts at run time, before their quantizer; the weights take the transposed inverse. So does a
map of the keys, whose transposed inverse the queries take at run time. A map of the values is fused on both sides, and
so are scales of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_transform
from kurtail_pl.maths.kronecker import Kronecker, kronecker_transform, nearest_sizes
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import map_keys
from kurtail_pl.surgery.linear import QuantizedLinear


class Pair(NamedTuple):
    """A map, and the inverse of its transpose."""

    forward: Kronecker
    inverse: Kronecker


Maps = Mapping[str, Pair]
"""By their places: the first of the linears that read the same, ``keys``, ``values``."""
Scales = Mapping[str, Tensor]
"""Of channels, by what writes them: a norm's name, or that of a gated MLP for what its down projection reads."""


def map_sizes(
    layer: nn.Module, architecture: Architecture, scheme: Scheme, head_dim: int
) -> dict[str, tuple[int, int]]:
    """Orders of both factors of every map that an equipped decoder layer has room for."""
    sizes = {}
    for first, *_ in architecture.readers_alike(layer):
        width = cast(int, layer.get_submodule(first).in_features)
        sizes[first] = (width // head_dim, head_dim) if first == architecture.output else nearest_sizes(width)
    for part in ("keys", "values"):
        if scheme.cache is not None and scheme.cache.quantizer(part) is not None:
            sizes[part] = 1, head_dim
    return sizes


def put_maps(layer: nn.Module, architecture: Architecture, maps: Maps) -> None:
    """Give an equipped decoder layer the modules of its maps; its weights stay."""
    for names in architecture.readers_alike(layer):
        for name in names if names[0] in maps else ():
            cast(QuantizedLinear, layer.get_submodule(name)).put_transform(maps[names[0]].forward)
    if "keys" in maps:
        map_keys(layer.get_submodule(architecture.attention), maps["keys"].forward)


def expect_maps(layer: nn.Module, architecture: Architecture, scheme: Scheme, head_dim: int) -> None:
    """Make room, without memory, for the maps that a checkpoint will bring."""
    sizes = map_sizes(layer, architecture, scheme, head_dim)
    empty = {name: Kronecker(*(torch.empty(n, n, device="meta") for n in orders)) for name, orders in sizes.items()}
    put_maps(layer, architecture, {name: Pair(each, each) for name, each in empty.items()})


def maps_state(layer: nn.Module, architecture: Architecture, maps: Maps) -> dict[str, Tensor]:
    """The tensors of the modules of maps, by their names in the layer; as they learn, these are no buffers."""
    modules = {f"{name}.transform": maps[names[0]].forward
               for names in architecture.readers_alike(layer) if names[0] in maps for name in names}  # fmt: skip
    if "keys" in maps:
        modules[f"{architecture.attention}.key_transform"] = maps["keys"].forward
    return {f"{name}.{side}": getattr(each, side) for name, each in modules.items() for side in ("left", "right")}


def mapped_weights(
    layer: nn.Module, architecture: Architecture, scales: Scales, maps: Maps, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A decoder layer's parameters, by name, when channels are scaled and its maps in place; it writes what it wrote.

    Differentiable in scales and maps; the layer keeps its own.

    Args:
        layer: equipped, with float weights.
        architecture: its record.
        scales: for ``[channels]`` of what is written.
        maps: of what is read.
        dtype: of the parameters that are given, and of all products.
    """
    found = {name: parameter.detach().to(dtype) for name, parameter in layer.named_parameters()}
    # Scales and the map of values act before an online rotation, whose inverse the weight holds.
    rotated = _rotated(layer, architecture)
    for name, factors in rotated.items():
        found[name] = hadamard_transform(found[name], factors.transposed())
    _scale(found, layer, architecture, scales)
    if "values" in maps:
        turn, back = (folding.per_kv_head(layer, architecture, each.right) for each in maps["values"])
        value, output = f"{architecture.value}.weight", f"{architecture.output}.weight"
        found[value] = folding.turn_values(found[value], turn.to(found[value]))
        bias = f"{architecture.value}.bias"
        if bias in found:
            found[bias] = folding.turn_values(found[bias].unsqueeze(1), turn.to(found[bias])).squeeze(1)
        found[output] = folding.turn_heads(found[output], back.to(found[output]))
    for name, factors in rotated.items():
        found[name] = hadamard_transform(found[name], factors)
    for names in architecture.readers_alike(layer):
        for name in names if names[0] in maps else ():
            found[f"{name}.weight"] = kronecker_transform(found[f"{name}.weight"], maps[names[0]].inverse)
    return found


def _rotated(layer: nn.Module, architecture: Architecture) -> dict[str, HadamardFactors]:
    """The weights that hold the inverse of an online rotation, R4 or R5."""
    linears = {name: cast(QuantizedLinear, layer.get_submodule(name)) for name in architecture.linears(layer)}
    return {f"{name}.weight": each.rotation.factors for name, each in linears.items() if each.rotation is not None}


def _scale(found: dict[str, Tensor], layer: nn.Module, architecture: Architecture, scales: Scales) -> None:
    """Multiply channels where they are written, and divide them where they are read, in a layer's tensors."""
    readers = {
        architecture.attention_norm: architecture.attention_readers,
        architecture.mlp_norm: folding.mlp_norm_readers(layer, architecture),
    }
    for norm, names in readers.items():
        if norm in scales:
            found[f"{norm}.weight"] = folding.scaled_norm(found[f"{norm}.weight"], scales[norm], architecture)
            for name in names:
                found[f"{name}.weight"] = found[f"{name}.weight"] / scales[norm]
    for mlp in architecture.gated_mlps(layer):
        if mlp not in scales:
            continue
        scale, up, down = scales[mlp], f"{mlp}.{architecture.up}", f"{mlp}.{architecture.down}.weight"
        found[down] = found[down] / scale
        # Where one linear makes both, up comes after gate.
        rows = torch.cat([scale.new_ones(len(found[f"{up}.weight"]) - len(scale)), scale])
        found[f"{up}.weight"] = found[f"{up}.weight"] * rows.unsqueeze(1)
        if f"{up}.bias" in found:
            found[f"{up}.bias"] = found[f"{up}.bias"] * rows
