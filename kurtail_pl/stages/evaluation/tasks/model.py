"""A loaded model as the harness sees it: tokens and prompts are the harness's, the arithmetic is arranged here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kurtail_pl.errors import CheckpointError, NotFinite, TextError
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.progress import track
from kurtail_pl.stages.evaluation.tasks.harness import quiet
from kurtail_pl.surgery.positions import rotary_border

BATCH_TOKENS = 1024
"""Tokens of a batch; more is no faster on a CPU and takes more memory for logits."""
SHARED_TOKENS = 32
"""A beginning that all inputs share, such as MMLU's examples, is run once if it is longer than this."""


class LoadedModel(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model around one that is loaded already.

    Answers that need the same input (one-token answers such as MMLU's letters) share one run, a beginning that all
    inputs have in common is run once and kept in a cache, inputs of one length make up a batch, so that nothing is
    padded, and logits are computed for the answers' tokens alone.

    Args:
        model: float or made by KurTail.
        tokenizer: of the model.

    Attributes:
        label: what the progress of the next requests is shown as; empty shows none.
        cut: how many of the last requests were too long for the model and lost their beginning, as in the harness.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        # What is longer than the model's context is cut, and counted, below.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.label, self.cut = "", 0

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, in nats, and whether greedy decoding writes it.

        Raises:
            CheckpointError: when a token is not in the model's vocabulary.
            NotFinite: when one of them is infinite or not a number: the likeliest answer would be any.
            TextError: when a continuation alone is longer than the model's context.
        """
        self._require_answerable(requests)
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            asked.setdefault(tuple(tokens[:-1]), []).append(number)
        self.cut = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        longest = {tokens: max(len(requests[i][2]) for i in numbers) for tokens, numbers in asked.items()}
        start, cache = self._shared(longest)
        answers: dict[int, tuple[float, bool]] = {}
        work = list(batches(list(asked)))
        for inputs in track(work, self.label) if self.label else work:
            keep = max(longest[tokens] for tokens in inputs)
            logits = self._logits([tokens[start:] for tokens in inputs], keep, cache)
            for answered, scores in zip(inputs, F.log_softmax(logits.float(), dim=-1), strict=True):
                for number in asked[answered]:
                    answers[number] = judged(scores, requests[number][2])
        return [answers[number] for number in range(len(requests))]

    def _require_answerable(self, requests: list[tuple[Any, list[int], list[int]]]) -> None:
        """Raise what `_loglikelihood_tokens` says of answers that are too long and of unknown tokens."""
        most = max((len(answer) for _, _, answer in requests), default=0)
        if most > self.max_length:
            raise TextError(
                f"an answer has {most} tokens and the model has {self.max_length} positions; leave its task out"
            )
        largest = max((max(context + answer, default=0) for _, context, answer in requests), default=0)
        vocabulary = self.model.config.vocab_size
        if largest >= vocabulary:
            raise CheckpointError(
                f"a question has token {largest} and the model has {vocabulary}; give the model's own tokenizer"
            )

    def _shared(self, longest: dict[tuple[int, ...], int]) -> tuple[int, Cache | None]:
        """How many tokens all inputs begin with, and the keys and values of these; 0 and None where it is no gain.

        Args:
            longest: input -> tokens of its longest answer, which are not part of the beginning.
        """
        border = rotary_border(self.model.config)
        beginning = shared_beginning(list(longest))[: min(len(tokens) - own for tokens, own in longest.items())]
        if len(beginning) <= SHARED_TOKENS or len(longest) == 1:
            return 0, None
        if border is not None and len(beginning) <= border < max(map(len, longest)):
            return 0, None  # Longer inputs have other angles from the first token on.
        ids = torch.tensor([beginning], device=self.device)
        return len(beginning), self.model(input_ids=ids, logits_to_keep=1, use_cache=True).past_key_values

    def _logits(self, inputs: list[tuple[int, ...]], keep: int, cache: Cache | None) -> Tensor:
        """Logits of the last tokens of inputs of one length, ``[batch, keep, vocabulary]``."""
        past = copy.deepcopy(cache)
        if past is not None:
            past.batch_repeat_interleave(len(inputs))
        ids = torch.tensor(inputs, device=self.device)
        found: Tensor = self.model(
            input_ids=ids, past_key_values=past, logits_to_keep=keep, use_cache=past is not None
        ).logits
        return found


def judged(scores: Tensor, answer: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an answer, and whether its tokens are the likeliest ones.

    Args:
        scores: logarithms of probabilities, ``[tokens, vocabulary]``, the last ones those of the answer's tokens.
        answer: tokens.
    """
    wanted = torch.tensor(answer, device=scores.device)
    last = scores[-len(wanted) :]
    total = last.gather(1, wanted.unsqueeze(1)).sum()
    if not is_finite(total):
        raise NotFinite(
            f"the log-likelihood of an answer is {total.item()}; the model's values are too large: use another copy of "
            "it"
        )
    return float(total), bool((last.argmax(-1) == wanted).all())


def shared_beginning(inputs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What all inputs begin with: what the first and the last in order do."""
    first, last = min(inputs), max(inputs)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def batches(inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Inputs of one length together, the longest first."""
    for length, alike in groupby(sorted(inputs, key=len, reverse=True), key=len):
        group, size = list(alike), max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]
