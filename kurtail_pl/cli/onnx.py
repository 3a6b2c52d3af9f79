"""The verbs of the ONNX export; they need the extra `onnx` (or `onnx-gpu`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TextStreamer

from kurtail_pl.errors import RuntimeUnusable
from kurtail_pl.stages.text import TextSpec

try:
    from kurtail_onnx.export import export as export_artefact
    from kurtail_onnx.graph.builder import Precision
    from kurtail_onnx.graph.linear import WeightForm
    from kurtail_onnx.run.decoder import Decoder
    from kurtail_onnx.run.folder import Export
    from kurtail_onnx.run.generate import Sampling
    from kurtail_onnx.run.generate import generate as generate_tokens
    from kurtail_onnx.run.perplexity import perplexity
    from kurtail_onnx.run.profiles import Profile
    from kurtail_onnx.run.session import Device, open_session
    from kurtail_onnx.spec import ExportSpec
except ModuleNotFoundError as missing:
    raise RuntimeUnusable(
        f"the ONNX verbs need the package {missing.name}; run: pip install 'kurtail-pl[onnx]' (or [onnx-gpu])"
    ) from missing


def export(
    artefact: Path,
    out: Path,
    dtype: Precision = "fp32",
    kv: Literal["packed", "float"] = "packed",
    weights: WeightForm = "qdq",
    act: Literal["qdq", "none"] = "qdq",
    check: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Write an ONNX model of an artefact, and check it.

    Args:
        artefact: folder that kurtail fit, fuse or quantize wrote.
        out: folder of the export.
        dtype: precision of everything that is not a code: fp32 (exact on a CPU), fp16 (for CUDA) or fp64 (equal to
            torch over whole texts, slow, on a CPU).
        kv: packed keeps codes in the cache; float the values they stand for, under the usual names and no smaller.
        weights: qdq (standard ONNX), matmulnbits (ONNX Runtime's kernel, spelled out) or integer (int8 products).
        act: qdq quantizes what linears read, none leaves it float.
        check: compare with the torch model; by default for models of up to a gigabyte.
        overwrite: replace `out` if it exists.
    """
    export_artefact(artefact, out, ExportSpec(dtype, kv, weights, act), check, overwrite)


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
