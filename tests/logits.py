"""Logits of a folder of ours beside those of the original, by transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import kurtail_pl

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))


def change(original: Path, fused: Path) -> float:
    """Largest change of the logits, relative to the largest logit."""
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(original)(IDS).logits
        value = kurtail_pl.load(fused)(IDS).logits
    return ((value - reference).abs().max() / reference.abs().max()).item()
