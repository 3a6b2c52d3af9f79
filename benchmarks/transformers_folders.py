"""Perplexity of folders of compressed-tensors in transformers, whoever wrote them.

    python benchmarks/transformers_folders.py --text wiki.test.raw exports/ours checkpoints/gptq

Every folder is read by `AutoModelForCausalLM.from_pretrained` and computes in float32, on the tokens of the first
folder's tokenizer. Prints a line for each: perplexity, and megabytes of its weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint


@torch.no_grad()
def perplexity(folder: Path, windows: Tensor) -> float:
    """Perplexity: exp of the mean cross-entropy of all predicted tokens of ``windows [n, seqlen]``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    return math.exp(torch.stack(losses).double().mean().item())


def main() -> None:
    """Print a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seqlen", type=int, default=2048)
    given = parser.parse_args()
    text = TextSpec(given.text, windows=given.windows, seqlen=given.seqlen)
    windows = cut_windows(Checkpoint(given.folders[0]), text, "evaluation").tokens
    for folder in given.folders:
        value = perplexity(folder, windows)
        megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        print(f"| {folder} | {value:.2f} | {megabytes:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
