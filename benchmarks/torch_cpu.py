"""Speed of an artefact in torch on a CPU, beside the float model that it was made from: a prompt, and new tokens.

    python benchmarks/torch_cpu.py --artefact artifacts/smollm2-135m-kurtail-w4a4kv4 --model smollm2-135m

Each way is timed in CPU seconds of this process, the best of several rounds in which all take turns. `simulated` is
what processors without VNNI do. Only ratios of one run say something.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kurtail_pl
from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.storage.sources import open_model

SIMULATED, PROBE = "simulated", "kurtail_pl.surgery.linear.processor_multiplies_integers"
NEW = 8
"""Tokens of a round, one after the other."""


def prompt(model: PreTrainedModel, ids: Tensor) -> float:
    """Milliseconds for all tokens at once."""
    start = time.process_time()
    model(ids, use_cache=False)
    return (time.process_time() - start) * 1e3


def new_token(model: PreTrainedModel, ids: Tensor) -> float:
    """Milliseconds for a token behind the others, the mean of several."""
    answer = model(ids, use_cache=True)
    start = time.process_time()
    for _ in range(NEW):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(token, past_key_values=answer.past_key_values, use_cache=True)
    return (time.process_time() - start) / NEW * 1e3


@torch.inference_mode()
def main() -> None:
    """Print a line of JSON for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--model", required=True, help="the float model: a name, folder or GGUF file")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    parser.add_argument("--behind", type=int, default=64, help="tokens before a new one")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    packed, cache = kurtail_pl.load(given.artefact), kurtail_pl.load(given.artefact, cache="packed")
    ways = {
        "float": whole_model(open_model(given.model)),
        "integers": packed,
        "packed cache": cache,
        "simulated": packed,
    }
    ids = torch.randint(packed.config.vocab_size, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    measures: dict[str, Callable[[PreTrainedModel], float]] = {
        "prompt_ms": lambda model: prompt(model, ids),
        "new_token_ms": lambda model: new_token(model, ids[:, : given.behind]),
    }
    best: dict[str, dict[str, float]] = {way: dict.fromkeys(measures, float("inf")) for way in ways}
    for _ in range(given.rounds):
        for way, model in ways.items():
            with patch(PROBE, partial(bool, way != SIMULATED)):
                for name, measure in measures.items():
                    best[way][name] = min(best[way][name], measure(model))
    for way, found in best.items():
        print(json.dumps({"way": way, **{name: round(value, 1) for name, value in found.items()}}))
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
