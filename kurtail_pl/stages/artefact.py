"""Load an artefact folder as a `transformers` model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from kurtail_pl.storage.checkpoint import Checkpoint, to_float
from kurtail_pl.storage.folder import require_intact, skeleton
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
    checkpoint = Checkpoint(folder)
    model = skeleton(checkpoint)
    state = {name: to_float(checkpoint.tensor(name), torch.float32) for name in checkpoint.names}
    model.load_state_dict(module_state(state, architecture_of(model.config)), assign=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
