"""A loaded model as the harness sees it: tokens and prompts are the harness's, the arithmetic is arranged here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kurtail_pl.progress import track
from kurtail_pl.stages.tasks.harness import quiet

log = logging.getLogger(__name__)

BATCH_TOKENS = 1024
"""Tokens of a batch; more is no faster on a CPU and takes more memory for logits."""


class LoadedModel(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model around one that is loaded already.

    Answers that need the same input (one-token answers such as MMLU's letters) share one run, inputs of one length make
    up a batch, so that nothing is padded, and logits are computed for the answers' tokens alone.

    Args:
        model: float or ours.
        tokenizer: of the model.

    Attributes:
        label: what the progress of the next requests is shown as; empty shows none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        # What is longer than the model's context is cut, and said, below.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.label = ""

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, in nats, and whether greedy decoding would write it.

        Inputs too long for the model lose their beginning, as in the harness.
        """
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            asked.setdefault(tuple(tokens[:-1]), []).append(number)
        cut = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if cut:
            log.warning(
                "%d of %d inputs exceed %d tokens and lose their beginning", cut, len(requests), self.max_length
            )
        answers: dict[int, tuple[float, bool]] = {}
        work = list(batches(list(asked)))
        for inputs in track(work, self.label) if self.label else work:
            keep = max(len(requests[number][2]) for tokens in inputs for number in asked[tokens])
            ids = torch.tensor(inputs, device=self.device)
            logits = self.model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
            for answered, scores in zip(inputs, F.log_softmax(logits.float(), dim=-1), strict=True):
                for number in asked[answered]:
                    wanted = torch.tensor(requests[number][2], device=self.device)
                    last = scores[-len(wanted) :]
                    total = last.gather(1, wanted.unsqueeze(1)).sum()
                    answers[number] = (float(total), bool((last.argmax(-1) == wanted).all()))
        return [answers[number] for number in range(len(requests))]


def batches(inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Inputs of one length together, the longest first."""
    for length, alike in groupby(sorted(inputs, key=len, reverse=True), key=len):
        group, size = list(alike), max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]
