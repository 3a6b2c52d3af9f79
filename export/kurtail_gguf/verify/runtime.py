"""llama.cpp itself, by the package xllamacpp, on a CPU with a float cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import torch
from numpy.typing import NDArray

from kurtail_pl.errors import CheckFailed, RuntimeUnusable, reason, shortened

CONTEXT = 256
"""Tokens: llama.cpp makes a multiple of this of what is asked for."""
SECONDS = 600
"""That an answer may take."""


class Likeliest(NamedTuple):
    """Tokens, the likeliest first, and the logarithms of their probabilities."""

    tokens: NDArray[np.int64]
    logarithms: NDArray[np.float64]


def import_runtime() -> ModuleType | None:
    """The package, or None where it is not installed.

    Raises:
        RuntimeUnusable: when it is, and its library does not load.
    """
    try:
        import xllamacpp
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        raise RuntimeUnusable(
            f"xllamacpp cannot be loaded ({reason(error)}); install it anew, or export with --check false"
        ) from error
    module: ModuleType = xllamacpp
    return module


class Runtime:
    """A loaded file.

    Args:
        package: `import_runtime`.
        path: the file.

    Raises:
        CheckFailed: when llama.cpp does not load it.
    """

    def __init__(self, package: ModuleType, path: Path) -> None:
        parameters = package.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = CONTEXT, 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.warmup, parameters.verbosity, parameters.fit_params = False, -1, False
        parameters.cache_type_k = parameters.cache_type_v = package.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self.server: Any = package.Server(parameters)
        except RuntimeError as error:
            raise CheckFailed(
                f"llama.cpp (xllamacpp {package.__version__}) does not load {path.name} ({reason(error)}); "
                "use a newer one"
            ) from error

    def tokens(self, text: str) -> list[int]:
        """Of a text, with the special tokens that stand around it."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        # The server is in this process: no proxy leads to it.
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            return [int(token) for token in json.load(answer)["tokens"]]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation of some tokens; those that are bytes of a letter are not told."""
        return [int(step["id"]) for step in self._complete(prompt, count, {"n_probs": 1, "temperature": 0})]

    def likeliest(self, prompt: Sequence[int], count: int, said: int) -> Likeliest:
        """The likeliest tokens behind some others.

        Args:
            prompt: token ids.
            count: how many.
            said: a token of whole letters, which is chosen: bytes that are no letter yet are not told.
        """
        (step,) = self._complete(prompt, 1, {"n_probs": count, "logit_bias": [[said, 1e3]]})
        top = step["top_logprobs"]
        return Likeliest(np.array([each["id"] for each in top]), np.array([each["logprob"] for each in top]))

    def _complete(self, prompt: Sequence[int], count: int, options: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.server.handle_completions(
            {"prompt": list(prompt), "n_predict": count, "cache_prompt": True, **options}
        )
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise CheckFailed(
                f"llama.cpp does not continue a text: {shortened(str(answer), 120)}; use another xllamacpp"
            )
        found: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
        return found
