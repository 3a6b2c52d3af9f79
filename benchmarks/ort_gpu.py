"""ONNX Runtime on CUDA: placement, fp16 perplexity against torch, prefill and decoding speed, device memory.

    pip install -e '.[onnx-gpu]'      # and no plain onnxruntime beside it
    kurtail fuse --model smollm2-135m --method none --out runs/ort/float
    python benchmarks/ort_gpu.py --artefact artifacts/smollm2-135m-kurtail-w4a4kv4 --float runs/ort/float

Prints one JSON object. Written on a machine without CUDA and never run on one; `--device cpu` runs it anywhere, to see
that it works.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.perplexity import perplexity
from kurtail_onnx.run.session import Device
from kurtail_onnx.verify.kernels import fused_linears, placement, time_by_part, trace
from ort_cpu import cache_bytes, decode_speed, load
from transformers import DynamicCache

import kurtail_pl
from kurtail_pl.stages.evaluation import perplexity as evaluate
from kurtail_pl.stages.export import export
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint

PREFILL, NEW = 384, 64
HOST_OPERATORS = {"Concat", "Range", "Shape", "Squeeze", "Sub", "Unsqueeze"}
"""Shape arithmetic, which ONNX Runtime keeps on the host."""


def used_memory(device: Device) -> int:
    """Bytes in use on the device, by everybody."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def prefill_speed(opened: Any, session: Any, device: Device) -> float:
    """Tokens a second of one prompt, the second time."""
    ids = np.arange(PREFILL, dtype=np.int64)[None] % 256
    for _ in range(2):
        decoder = Decoder(opened, session, device=device)
        before = time.perf_counter()
        decoder.forward(ids)
        seconds = time.perf_counter() - before
    return PREFILL / seconds


@torch.no_grad()
def torch_speeds(artefact: Path, device: Device) -> dict[str, float]:
    """The same of the simulation in torch."""
    model = kurtail_pl.load(artefact).to(device)
    ids = torch.arange(PREFILL, device=device)[None] % 256
    for _ in range(2):
        cache, before = DynamicCache(), time.perf_counter()
        logits = model(ids, past_key_values=cache).logits.cpu()
        prefill = time.perf_counter() - before
    before = time.perf_counter()
    for _ in range(NEW):
        logits = model(logits[:, -1:].argmax(-1).to(device), past_key_values=cache).logits.cpu()
    return {"prefill": PREFILL / prefill, "decode": NEW / (time.perf_counter() - before)}


def measure(folder: Path, text: TextSpec, device: Device) -> dict[str, Any]:
    """Everything about one export."""
    before = used_memory(device)
    opened, session, seconds = load(folder, "exact", device=device)
    weights = used_memory(device) - before
    result = {
        "provider": session.get_providers()[0],
        "load_seconds": seconds,
        "weights_bytes_on_device": weights,
        "cache_bytes_a_token": cache_bytes(opened, session, device),
        "prefill": prefill_speed(opened, session, device),
        "decode": max(decode_speed(opened, session, device) for _ in range(3)),
        "perplexity": perplexity(opened, text, "exact", device),
    }
    kernels = trace(opened, "exact", device, steps=(16, *[1] * 4))
    placed = placement(kernels)
    on_host = set(placed.get("CPUExecutionProvider", {})) if device == "cuda" else set()
    return result | {
        "fused_linears": fused_linears(kernels),
        "placement": placed,
        "unexpected_on_host": sorted(on_host - HOST_OPERATORS),
        "time": time_by_part(kernels),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--float", type=Path, required=True, dest="float_model")
    parser.add_argument("--work", type=Path, default=Path("runs/ort"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    text = TextSpec(windows=args.windows, seqlen=args.seqlen)
    result: dict[str, Any] = {
        "torch": {
            "perplexity": evaluate.perplexity(Checkpoint(args.artefact), text)["perplexity"],
            **torch_speeds(args.artefact, args.device),
        }
    }
    for name, source in (("quantized", args.artefact), ("float", args.float_model)):
        folder = export(source, args.work / f"{name}-fp16", ONNX("fp16"), check=False, overwrite=True)
        result[name] = measure(folder, text, args.device)
    result["perplexity_change"] = result["quantized"]["perplexity"] / result["torch"]["perplexity"] - 1
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
