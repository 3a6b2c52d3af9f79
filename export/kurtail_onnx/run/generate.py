"""Generation: greedy or sampled tokens, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kurtail_onnx.run.decoder import Decoder
from kurtail_pl.errors import ConfigError, InputError, require_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: the most tokens that are generated.
        temperature: 0 takes the likeliest token; higher flattens the distribution.
        top_p: keep the likeliest tokens that together have this probability.
        seed: of the draws.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; give a positive number")
        if not 0 <= self.temperature < np.inf:
            raise ConfigError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; give a probability in (0, 1]")


def generate(decoder: Decoder, prompt: NDArray[np.int64], sampling: Sampling) -> Iterator[int]:
    """Yield new tokens until one ends the text.

    Args:
        decoder: fresh, batch 1.
        prompt: ``[1, tokens]``.
        sampling: how tokens are chosen.

    Raises:
        InputError: before any work, when the prompt is empty or does not leave room for the new tokens.
    """
    room = decoder.export.positions - prompt.shape[1]
    if prompt.shape[1] == 0 or room < sampling.max_new_tokens:
        raise InputError(
            f"a prompt of {prompt.shape[1]} tokens and {sampling.max_new_tokens} new ones were asked for; the prompt "
            f"needs a token, and the model has {decoder.export.positions} positions"
        )
    draw = np.random.default_rng(sampling.seed)
    logits = decoder.forward(prompt)
    for number in range(sampling.max_new_tokens):
        token = choose(logits[0, -1], sampling, draw)
        yield token
        if token in decoder.export.eos_token_ids or number == sampling.max_new_tokens - 1:
            return
        logits = decoder.forward(np.array([[token]]))


def choose(logits: NDArray[np.float32], sampling: Sampling, draw: np.random.Generator) -> int:
    """One token from logits ``[vocabulary]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = probabilities[order].cumsum() - probabilities[order]
    kept = order[before < sampling.top_p]
    return int(draw.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
