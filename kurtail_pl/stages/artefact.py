"""Load an artefact folder as a `transformers` model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from kurtail_pl.storage.checkpoint import Checkpoint, to_float
from kurtail_pl.storage.folder import require_intact, skeleton
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.layout import module_state


def load(folder: str | Path) -> PreTrainedModel:
    """Give back the quantized model of an artefact folder, ready for `forward` and `generate`.

    Weights stay packed in memory and are dequantized when used; activations, keys and values are quantized on the fly.
    The logits of a window equal those that were evaluated, bit for bit, on the same machine.

    Args:
        folder: what `kurtail fit`, `quantize` or `fuse` wrote.

    Returns:
        A model in evaluation mode, float32, on the CPU. The tokenizer loads from the same folder with
        `transformers.AutoTokenizer`.

    Raises:
        ArtefactError: when the folder is not ours, incomplete or damaged.
        CheckpointError: when a file is missing.
    """
    folder = Path(folder)
    require_intact(folder)
    model = whole_model(Checkpoint(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def whole_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of any folder, plain or ours, with all its weights in memory: float32, on the CPU, evaluation mode."""
    model = skeleton(checkpoint)
    architecture = architecture_of(model.config)
    layers = [f"{architecture.layers}.{index}" for index in range(len(layers_of(model, architecture)))]
    for name in (architecture.embedding, architecture.final_norm, architecture.head, *layers):
        state = module_state(checkpoint.tensors_under(name), architecture)
        tensors = {key: to_float(tensor, torch.float32) for key, tensor in state.items()}
        model.get_submodule(name).load_state_dict(tensors, assign=True)
    return model
