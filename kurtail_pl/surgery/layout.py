"""A checkpoint's tensors by the names of our modules: families and versions name and stack them in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
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
    if architecture.interleaved:
        return _apart(named, architecture)
    gate_up, down = (named.pop(f"{architecture.experts}.{name}", None) for name in ("gate_up_proj", "down_proj"))
    if gate_up is not None and down is not None:
        for number, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            parts = (architecture.gate, architecture.up, architecture.down)
            for part, weight in zip(parts, (*both.chunk(2), last), strict=True):
                named[f"{architecture.experts}.{number}.{part}.weight"] = weight
    return named


def checkpoint_state(state: Mapping[str, Tensor], architecture: Architecture, plain: bool = False) -> dict[str, Tensor]:
    """Inverse of `module_state`: a decoder layer's tensors by the names that checkpoints on the hub have.

    Args:
        state: by the names of our modules, relative to the layer.
        architecture: record of the family.
        plain: for transformers' own model: experts are stacked where it reads no others.
    """
    if plain and architecture.interleaved:
        state = _interleaved(state, architecture)
    return {checkpoint_name(name, architecture): tensor for name, tensor in state.items()}


def _apart(named: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Experts one by one, of stacks ``[experts, in, out]`` in which gate and up take turns; the rest as it is."""
    found, names = {}, {each: f"{architecture.experts}.{each}" for each in ("gate_up_proj", "down_proj")}
    for name, tensor in named.items():
        kind = "bias" if name.endswith("_bias") else "weight"
        stack = name.removesuffix("_bias")
        if stack not in names.values():
            found[name] = tensor
            continue
        parts = {architecture.down: tensor}
        if stack == names["gate_up_proj"]:
            parts = {str(architecture.gate): tensor[..., ::2], architecture.up: tensor[..., 1::2]}
        for part, all_experts in parts.items():
            for number, each in enumerate(all_experts):
                own = each.T if kind == "weight" else each
                found[f"{architecture.experts}.{number}.{part}.{kind}"] = own.contiguous()
    return found


def _interleaved(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Inverse of `_apart`."""
    prefix = f"{architecture.experts}."
    found = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    count = len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
    for kind, ending in (("weight", ""), ("bias", "_bias")):
        gate, up, down = (
            torch.stack([state[f"{prefix}{number}.{part}.{kind}"] for number in range(count)])
            for part in (architecture.gate, architecture.up, architecture.down)
        )
        both = torch.stack([gate, up], 2).flatten(1, 2)
        both, down = (both.mT, down.mT) if kind == "weight" else (both, down)
        found[f"{prefix}gate_up_proj{ending}"] = both.contiguous()
        found[f"{prefix}down_proj{ending}"] = down.contiguous()
    return found


def stacked(layer: nn.Module, architecture: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Stacked experts of a decoder layer: name -> shape, and the weights of our modules that it holds."""
    if not architecture.has_experts(layer):
        return {}
    mlps = architecture.routed_mlps(layer)
    gate = cast(nn.Linear, layer.get_submodule(f"{mlps[0]}.{architecture.gate}"))
    width, hidden = gate.weight.shape

    def both(kind: str) -> tuple[str, ...]:
        return tuple(f"{mlp}.{part}.{kind}" for mlp in mlps for part in (architecture.gate, architecture.up))

    def down(kind: str) -> tuple[str, ...]:
        return tuple(f"{mlp}.{architecture.down}.{kind}" for mlp in mlps)

    name, count = architecture.experts, len(mlps)
    if not architecture.interleaved:
        return {
            f"{name}.gate_up_proj": ((count, 2 * width, hidden), both("weight")),
            f"{name}.down_proj": ((count, hidden, width), down("weight")),
        }
    return {
        f"{name}.gate_up_proj": ((count, hidden, 2 * width), both("weight")),
        f"{name}.gate_up_proj_bias": ((count, 2 * width), both("bias")),
        f"{name}.down_proj": ((count, width, hidden), down("weight")),
        f"{name}.down_proj_bias": ((count, hidden), down("bias")),
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
