"""Perplexity, size and speed of GGUF files in llama.cpp itself, by the package xllamacpp, on a CPU.

    python benchmarks/gguf_files.py exports/ours/model.gguf exports/float/model.gguf --artefact artifacts/ours

The text is that of `kurtail eval` in the artefact's tokens: each token is forced, and the logarithm of its probability
read. Speeds are of a prompt and of greedy tokens behind it, on one thread, in the processor's time, which other work on
the machine takes least from; the files take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp

from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint

FORCED = 1e4
"""Added to the logit of a token that is to come next; probabilities are told without it."""
PROMPT, NEW = 256, 64
"""Tokens whose speed is measured: of a text, and greedy ones behind it."""


def server_of(path: Path, context: int, cache: str) -> Any:
    """llama.cpp with a file, on one thread."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup, parameters.verbosity, parameters.fit_params = False, -1, False
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    parameters.cache_type_k = parameters.cache_type_v = kind
    return xllamacpp.Server(parameters)


def surprise(server: Any, tokens: list[int]) -> list[float]:
    """Negative logarithms of the probabilities of all tokens but the first."""
    found = []
    for position in range(1, len(tokens)):
        answer = server.handle_completions({
            "prompt": tokens[:position], "n_predict": 1, "cache_prompt": True, "n_probs": 1, "temperature": 0,
            "logit_bias": [[tokens[position], FORCED]],
        })  # fmt: skip
        (step,) = answer["choices"][0]["logprobs"]["content"]
        if step["id"] != tokens[position]:
            raise SystemExit(f"llama.cpp chose {step['id']} where {tokens[position]} was forced")
        found.append(-float(step["logprob"]))
    return found


def perplexity(server: Any, windows: list[list[int]]) -> float:
    """Over all windows."""
    losses = [loss for window in windows for loss in surprise(server, window)]
    return math.exp(statistics.fmean(losses))


def processor_seconds(run: Callable[[], Any]) -> float:
    """What all threads of this process took."""
    before = time.process_time()
    run()
    return time.process_time() - before


def speeds(server: Any, prompt: list[int]) -> tuple[float, float]:
    """Tokens a second of a prompt that is not known yet, and of the greedy tokens behind it."""
    request = {"prompt": prompt, "ignore_eos": True, "temperature": 0}
    read = processor_seconds(lambda: server.handle_completions({**request, "n_predict": 1, "cache_prompt": False}))
    new = processor_seconds(lambda: server.handle_completions({**request, "n_predict": NEW, "cache_prompt": True}))
    return len(prompt) / read, NEW / new


def main() -> None:
    """Print a line of JSON for each cache and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--artefact", type=Path, required=True, help="whose tokenizer cuts the text")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--caches", nargs="+", default=["f16", "q4_0"], help="f16, f32, q8_0 or q4_0")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of speed; their median is told")
    given = parser.parse_args()
    text = TextSpec(given.text, windows=given.windows, seqlen=given.seqlen)
    windows = cut_windows(Checkpoint(given.artefact), text, "evaluation").tokens.tolist()
    context = -(-(max(given.seqlen, PROMPT + NEW) + 8) // 256) * 256
    for cache in given.caches:
        servers = {path: server_of(path, context, cache) for path in given.files}
        timed = [
            {path: speeds(server, windows[0][:PROMPT]) for path, server in servers.items()}
            for _ in range(given.repeats)
        ]
        for path, server in servers.items():
            prompt, new = (statistics.median(each) for each in zip(*(turn[path] for turn in timed), strict=True))
            report: dict[str, Any] = {
                "file": path.name,
                "cache": cache,
                "perplexity": perplexity(server, windows),
                "megabytes": path.stat().st_size / 1e6,
                "prompt_tokens_per_second": prompt,
                "new_tokens_per_second": new,
                "xllamacpp": xllamacpp.__version__,
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
