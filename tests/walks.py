"""What tests walk by themselves: windows of a text, hidden states before the first layer, a text through a model."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from kurtail_pl.stages.text import TextSpec
from kurtail_pl.streaming.walker import Walker


@torch.no_grad()
def embed(walker: Walker, windows: Tensor) -> list[Tensor]:
    embedding = walker.embedding()
    hidden = [walker.embed(embedding, window[None]) for window in windows]
    embedding.to("meta")
    return hidden


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, tokenizer: Any, text: Path, windows: int, seqlen: int) -> float:
    """Window by window, as the stage does: other shapes have other last bits, which codes make large."""
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    losses = []
    for window in ids[: windows * seqlen].view(windows, seqlen):
        logits = model(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(torch.stack(losses).mean())


def windows_of(folder: Path, text: TextSpec) -> Tensor:
    """The first windows, from the tokenizer's output."""
    content = Path(text.source).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(content, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: text.windows * text.seqlen]).view(text.windows, text.seqlen)
