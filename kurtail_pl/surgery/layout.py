"""A checkpoint's tensors by the names of our modules: families and versions name and stack them in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from kurtail_pl.surgery.architecture import Architecture


def module_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A decoder layer's tensors by the names of our modules.

    Args:
        state: tensors by their names in the checkpoint, relative to the layer or, where no experts are stacked, to the
            model; experts one by one, as on the hub, or
            stacked, as transformers holds them.
        architecture: record of the family.
    """
    named = {module_name(name, architecture): tensor for name, tensor in state.items()}
    gate_up, down = (named.pop(f"{architecture.experts}.{name}", None) for name in ("gate_up_proj", "down_proj"))
    if gate_up is not None and down is not None:
        for number, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            parts = (architecture.gate, architecture.up, architecture.down)
            for part, weight in zip(parts, (*both.chunk(2), last), strict=True):
                named[f"{architecture.experts}.{number}.{part}.weight"] = weight
    return named


def checkpoint_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Inverse of `module_state`: a decoder layer's tensors by the names that checkpoints on the hub have."""
    return {checkpoint_name(name, architecture): tensor for name, tensor in state.items()}


def stacked(layer: nn.Module, architecture: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Stacked experts of a decoder layer: name -> shape, and the weights of our modules that it holds."""
    if not architecture.has_experts(layer):
        return {}
    mlps = architecture.routed_mlps(layer)
    gate = cast(nn.Linear, layer.get_submodule(f"{mlps[0]}.{architecture.gate}"))
    width, hidden = gate.weight.shape
    both = tuple(f"{mlp}.{part}.weight" for mlp in mlps for part in (architecture.gate, architecture.up))
    down = tuple(f"{mlp}.{architecture.down}.weight" for mlp in mlps)
    return {
        f"{architecture.experts}.gate_up_proj": ((len(mlps), 2 * width, hidden), both),
        f"{architecture.experts}.down_proj": ((len(mlps), hidden, width), down),
    }


def module_name(name: str, architecture: Architecture) -> str:
    """Name in our modules of a tensor that checkpoints on the hub call `name`."""
    for ours, theirs in architecture.on_disk:
        name = name.replace(theirs, ours)
    return name


def checkpoint_name(name: str, architecture: Architecture) -> str:
    """Name in checkpoints of a tensor that our modules call `name`."""
    for ours, theirs in architecture.on_disk:
        name = name.replace(ours, theirs)
    return name
