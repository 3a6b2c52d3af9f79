"""The modules of a model folder, plain or made by KurTail: without weights, and with all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kurtail_pl.artefact.placement import place
from kurtail_pl.methods.format import Buffer
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.storage.card import is_ours, read_card, require_sound, rotations_of, scheme_of
from kurtail_pl.storage.checkpoint import Checkpoint, to_float
from kurtail_pl.surgery.equip import (
    empty_model,
    equip_model,
    expect_quantized,
    layers_of,
    readers_alike,
    require_scheme_fits,
    set_clips,
)
from kurtail_pl.surgery.exact import exact_names
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.invertible import expect_maps
from kurtail_pl.surgery.layout import module_state
from kurtail_pl.surgery.linear import side_buffers
from kurtail_pl.surgery.rotations import head_dim_of

CPU = torch.device("cpu")


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The modules that a folder's weights belong in, without the weights (device ``meta``).

    Raises:
        ArtefactError: when the folder is ours, and a file is missing or not the one that was written.
    """
    require_sound(checkpoint.folder)
    model = empty_model(checkpoint.config)
    if is_ours(checkpoint.folder):
        equip(model, checkpoint.folder)
    return model


def equip(model: PreTrainedModel, folder: Path) -> None:
    """Make an empty plain model expect the weights of a KurTail folder, and compute what that folder does, in place."""
    scheme = scheme_of(folder)
    require_scheme_fits(model.config, scheme)
    equip_model(model, scheme, rotations_of(folder))
    expect_quantized(model, scheme)
    card = read_card(folder)
    if clips := card.get("clips"):
        set_clips(model, clips)
    if card.get("transforms"):
        architecture = architecture_of(model.config)
        for layer in layers_of(model, architecture):
            expect_maps(layer, architecture, scheme, head_dim_of(model.config))


def whole_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> PreTrainedModel:
    """The model of any folder, plain or made by KurTail, with all its weights in memory, in evaluation mode.

    Raises:
        ConfigError: when the type does not hold the weights.
    """
    model = skeleton(checkpoint)
    for name, tensors in parts_of(checkpoint, model):
        part = model.get_submodule(name)
        checkpoint.fill(part, name, tensors)
        place(part, name, dtype, device)
    model.get_submodule(architecture_of(model.config).rotary).to(device)
    return model


def parts_of(checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each module of a model that is read at once, by name, and its tensors, floats as float32."""
    architecture = architecture_of(model.config)
    layers = [f"{architecture.layers}.{index}" for index in range(len(layers_of(model, architecture)))]
    for name in (architecture.embedding, architecture.final_norm, architecture.head, *layers):
        state = module_state(checkpoint.tensors_under(name), architecture)
        yield name, {key: to_float(tensor, torch.float32) for key, tensor in state.items()}


def stored_bytes(model: PreTrainedModel, scheme: Scheme) -> int:
    """Bytes of the weights of an equipped float model in an artefact of a scheme, which keeps floats in float16."""
    rounded, numbers = _rounded(model, scheme)
    floats = torch.float16.itemsize * (sum(each.numel() for each in model.parameters()) - numbers)
    return rounded + floats + _of_buffers(model)


def _of_buffers(model: PreTrainedModel) -> int:
    """Bytes of stored buffers: those that no cast changes keep their type."""
    stored, exact = model.state_dict(), exact_names(model)
    return sum(
        buffer.numel() * (buffer.itemsize if name.rpartition(".")[2] in exact else torch.float16.itemsize)
        for name, buffer in model.named_buffers()
        if name in stored
    )


def bits_per_weight(model: PreTrainedModel, scheme: Scheme) -> float | None:
    """Bits of all that is stored of the linears' weights, scales and sides included, for each number of a weight."""
    rounded, numbers = _rounded(model, scheme)
    return 8 * rounded / numbers if numbers else None


def _rounded(model: PreTrainedModel, scheme: Scheme) -> tuple[int, int]:
    """Bytes of all that is stored of rounded weights, and how many numbers these have."""
    architecture, size, numbers = architecture_of(model.config), 0, 0
    for index, layer in enumerate(layers_of(model, architecture)):
        weights = scheme.layer_weights(index)
        if weights is None:
            continue
        for linears in readers_alike(layer, architecture):
            for linear in linears:
                size += _bytes(weights.buffers(linear.out_features, linear.in_features))
                numbers += linear.out_features * linear.in_features
            if scheme.side is not None:
                size += _bytes(side_buffers(linears, scheme.side))
    return size, numbers


def _bytes(buffers: Mapping[str, Buffer]) -> int:
    return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in buffers.values())
