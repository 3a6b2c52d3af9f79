"""ONNX Runtime on a CPU: cost of the export, sizes, decoding speed against the float model, shares of time.

    kurtail fuse --model smollm2-135m --method none --out runs/ort/float
    python benchmarks/ort_cpu.py --artefact artifacts/smollm2-135m-kurtail-w4a4kv4 --float runs/ort/float

Prints one JSON object. The float model is exported by the same graph builder, in fp32; decoding alternates between the
models, and the fastest of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from kurtail_onnx.profiles import Profile
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.perplexity import perplexity
from kurtail_onnx.run.session import Device, open_session
from kurtail_onnx.verify.kernels import time_by_part, trace

from kurtail_pl.stages.text import TextSpec

PROMPT, NEW = 16, 128
TEXT = TextSpec(windows=2, seqlen=512)


def export(artefact: Path, folder: Path, *options: str) -> dict[str, float]:
    """Export by the command in a process of its own; seconds and peak resident memory in gigabytes."""
    before = time.perf_counter()
    command = [sys.executable, "-m", "kurtail_pl", "export", "--artefact", artefact, "--out", folder, "--overwrite"]
    subprocess.run([*map(str, command), *options], check=True)
    seconds = time.perf_counter() - before
    # Kilobytes of the largest child so far: the first export is the one that is reported.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return {"seconds": round(seconds, 1), "peak_gigabytes": round(peak, 2)}


def load(folder: Path, profile: Profile, threads: int = 0, device: Device = "cpu") -> tuple[Export, Any, float]:
    """An export, its session, and the seconds that opening it took."""
    opened = Export(folder)
    before = time.perf_counter()
    session = open_session(opened.model, profile, device, threads)
    return opened, session, time.perf_counter() - before


def decode_speed(opened: Export, session: Any, device: Device = "cpu") -> float:
    """New tokens a second, one text, greedy, after a short prompt."""
    decoder = Decoder(opened, session, device=device)
    logits = decoder.forward(np.arange(PROMPT, dtype=np.int64)[None] + 100)
    before = time.perf_counter()
    for _ in range(NEW):
        logits = decoder.forward(logits[:, -1:].argmax(-1))
    return NEW / (time.perf_counter() - before)


def cache_bytes(opened: Export, session: Any, device: Device = "cpu") -> float:
    """Bytes of the cache for each token, from its arrays."""
    decoder = Decoder(opened, session, device=device)
    decoder.forward(np.zeros((1, 4), np.int64))
    return sum(array.nbytes for array in decoder.cache().values()) / 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--float", type=Path, required=True, dest="float_model")
    parser.add_argument("--work", type=Path, default=Path("runs/ort"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    quantized, floating = args.work / "quantized", args.work / "fp32"
    result: dict[str, Any] = {"export": export(args.artefact, quantized, "--check", "false")}
    result["export_and_check"] = export(args.artefact, quantized)
    export(args.float_model, floating, "--check", "false")
    runs: dict[str, tuple[Path, Profile]] = {
        "fp32": (floating, "exact"),
        "exact": (quantized, "exact"),
        "fast": (quantized, "fast"),
    }
    opened = {name: load(folder, profile, args.threads) for name, (folder, profile) in runs.items()}
    result["load_seconds"] = {name: round(seconds, 2) for name, (_, _, seconds) in opened.items()}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, (export_, session, _) in opened.items():
            speeds[name].append(decode_speed(export_, session))
    result["tokens_a_second"] = {name: round(max(values), 1) for name, values in speeds.items()}
    result["cache_bytes_a_token"] = {
        name: cache_bytes(export_, session) for name, (export_, session, _) in opened.items()
    }
    result["perplexity"] = {name: perplexity(opened[name][0], TEXT, profile) for name, (_, profile) in runs.items()}
    steps = (PROMPT, *[1] * 8)
    result["time"] = {
        name: time_by_part(trace(opened[name][0], profile, steps=steps, threads=args.threads))
        for name, (_, profile) in runs.items()
    }
    result["data_bytes"] = {name: (folder / "model.onnx.data").stat().st_size for name, (folder, _) in runs.items()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
