"""What a model goes on with after a prompt."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import BatchEncoding

from kurtail_pl.artefact.load import load
from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.errors import ConfigError
from kurtail_pl.storage.card import is_ours
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.positions import require_positions


def prompted(checkpoint: Checkpoint, prompt: str, tokens: int) -> BatchEncoding:
    """A prompt as the model reads it, ``[1, length]``, with special tokens where its tokenizer adds them.

    Raises:
        ConfigError: when it has no token, or with so many tokens after it is longer than the model's positions.
    """
    found: BatchEncoding = checkpoint.tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
    length = found["input_ids"].shape[1]
    if not length:
        raise ConfigError(f"the prompt is {prompt!r}; give one of at least one token")
    require_positions(length + tokens, checkpoint.positions)
    return found


@torch.no_grad()
def continuation(checkpoint: Checkpoint, prompt: str, tokens: int) -> str:
    """Let a model go on after a prompt, with the most likely token each time, in float32 on the CPU.

    Args:
        checkpoint: a KurTail folder, which is loaded by `load`, or a plain model.
        prompt: at least one token.
        tokens: how many are added, at most: a model may end its text.

    Returns:
        What was added, without the prompt and without special tokens.

    Raises:
        ConfigError: as `prompted` does.
    """
    tokenizer, start = checkpoint.tokenizer(), prompted(checkpoint, prompt, tokens)
    model = load(checkpoint.folder) if is_ours(checkpoint.folder) else whole_model(checkpoint)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    made = cast(Any, model).generate(**start, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(made[0, start["input_ids"].shape[1] :], skip_special_tokens=True))
