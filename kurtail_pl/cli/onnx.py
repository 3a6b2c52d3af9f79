"""What runs an ONNX export; it needs the extra `onnx` (or `onnx-gpu`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TextStreamer

from kurtail_pl.errors import RuntimeUnusable
from kurtail_pl.stages.text import TextSpec

try:
    from kurtail_onnx.profiles import Profile
    from kurtail_onnx.run.decoder import Decoder
    from kurtail_onnx.run.folder import Export
    from kurtail_onnx.run.generate import Sampling
    from kurtail_onnx.run.generate import generate as generate_tokens
    from kurtail_onnx.run.perplexity import perplexity
    from kurtail_onnx.run.session import Device, open_session
except ModuleNotFoundError as missing:
    raise RuntimeUnusable(
        f"running an ONNX export needs the package {missing.name}; run: pip install 'kurtail-pl[onnx]' (or [onnx-gpu])"
    ) from missing


def generate(
    onnx: Path, prompt: str, sampling: Sampling, profile: Profile = "exact", device: Device = "cpu", threads: int = 0
) -> None:
    """Continue a prompt by an export, printing the text as it comes.

    Args:
        onnx: folder that kurtail export wrote.
        prompt: text to continue.
        sampling: length, temperature, seed.
        profile: exact (float32 activations) or fast (activations rounded to 8 bits once more).
        device: cpu or cuda.
        threads: of one operator; 0 leaves the choice to ONNX Runtime.
    """
    opened = Export(onnx)
    tokenizer = opened.tokenizer()
    ids = np.array(tokenizer([prompt])["input_ids"], np.int64)
    decoder = Decoder(opened, open_session(opened.model, profile, device, threads), device=device)
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True)  # its methods have no types
    streamer.put(torch.from_numpy(ids))
    for token in generate_tokens(decoder, ids, sampling):
        streamer.put(torch.tensor([token]))
    streamer.end()


def measure(onnx: Path, text: TextSpec, profile: Profile, device: Device) -> float:
    """Perplexity of an export."""
    return perplexity(Export(onnx), text, profile, device)
