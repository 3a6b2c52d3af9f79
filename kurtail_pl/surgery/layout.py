"""A checkpoint's tensors by the names of our modules: families and versions name and stack them in several ways."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kurtail_pl.surgery.architecture import Architecture

FREQUENCIES = ".rotary_emb.inv_freq"
"""Old Llama checkpoints hold the rotary frequencies in every layer; they follow from the configuration."""


def module_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A decoder layer's tensors by the names of our modules.

    Args:
        state: tensors by their names in the checkpoint, relative to the layer or, where no experts are stacked, to the
            model; experts one by one, as on the hub, or
            stacked, as transformers holds them.
        architecture: record of the family.
    """
    named = {_ours(name, architecture): tensor for name, tensor in state.items() if not name.endswith(FREQUENCIES)}
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


def _ours(name: str, architecture: Architecture) -> str:
    for ours, theirs in architecture.on_disk:
        name = name.replace(theirs, ours)
    return name


def checkpoint_name(name: str, architecture: Architecture) -> str:
    """Name in checkpoints of a tensor that our modules call `name`."""
    for ours, theirs in architecture.on_disk:
        name = name.replace(ours, theirs)
    return name
