"""Decoding in ONNX Runtime and in llama.cpp, in turn, on a CPU.

    kurtail export --artefact artifacts/smollm2-135m-kurtail-w4a4kv4 --to onnx --out exports/onnx
    python benchmarks/ort_llama.py --export exports/onnx --file smollm2-Q4_1.gguf

Each turn decodes the same number of greedy tokens behind a short prompt in both, on one thread. What counts is the time
of the processor, which other work on a machine takes least from. Prints tokens a second of the medians, their ratio,
and the smallest and largest ratio of a turn. What the parts of the graph take, `ort_cpu.py` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from gguf_files import processor_seconds, server_of
from ort_cpu import NEW, PROMPT, decode_speed, load


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="folder of kurtail export --to onnx")
    parser.add_argument("--file", type=Path, required=True, help="GGUF file of the same model")
    parser.add_argument("--cache", default="f16", help="llama.cpp's: f16, f32, q8_0 or q4_0")
    parser.add_argument("--profile", choices=["exact", "fast"], default="fast")
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    opened, session, _ = load(given.export, given.profile, 1)
    server = server_of(given.file, 256, given.cache)
    request = {"prompt": list(range(100, 100 + PROMPT)), "n_predict": NEW, "cache_prompt": False, "ignore_eos": True}
    turns = [
        (
            processor_seconds(lambda: decode_speed(opened, session)),
            processor_seconds(lambda: server.handle_completions({**request, "temperature": 0})),
        )
        for _ in range(given.turns)
    ]
    ours, theirs = (NEW / statistics.median(each) for each in zip(*turns, strict=True))
    ratios = sorted(other / mine for mine, other in turns)
    report = {
        "onnxruntime": ours,
        "llama.cpp": theirs,
        "ratio": ours / theirs,
        "ratios": [ratios[0], ratios[-1]],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
