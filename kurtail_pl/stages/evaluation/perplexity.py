"""Evaluate: perplexity of any model folder, plain or made by KurTail, one decoder layer in memory at a time."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch

from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.metrics import Perplexity
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.text import TextSpec, cut_windows, said
from kurtail_pl.storage.card import require_sound
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import model_key, tokens_sha256
from kurtail_pl.storage.resume import resumable_work
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker

log = logging.getLogger(__name__)


@torch.no_grad()
def perplexity(checkpoint: Checkpoint, spec: TextSpec, compute: Compute = AUTO) -> dict[str, Any]:
    """Perplexity over the first windows of a text.

    Rows are joined by blank lines and tokenised once without special tokens; windows do not overlap; the mean negative
    log-likelihood is over all predicted tokens (GPTQ's protocol).

    Args:
        checkpoint: model folder.
        spec: text, number and length of the windows.
        compute: device and floating-point type of the model; log-likelihoods are added in float64.

    Returns:
        ``perplexity`` with text, windows, seqlen, dtype, threads of the CPU, predicted tokens, the text's hash and the
        cost.

    Raises:
        ArtefactError: when KurTail made the folder and a file of it is missing or damaged.
        ConfigError: when the windows are longer than the model's positions.
        NotFinite: when the perplexity, or what leads to it, is infinite or not a number.
        TextError: when the text is too short.
    """
    require_sound(checkpoint.folder)
    windows = cut_windows(checkpoint, spec, "evaluation")
    spec = windows.spec
    settings = {**asdict(spec), "dtype": compute.dtype}
    recipe = {**model_key(checkpoint), "tokens_sha256": tokens_sha256(windows.tokens), "dtype": compute.dtype}
    with resumable_work(recipe) as work, Meter(work.state.get("cost")) as meter:
        walker = Walker(checkpoint, skeleton(checkpoint), compute.torch_dtype, compute.torch_device)
        hidden = walker.hidden_states(windows.tokens, work)
        for _, layer in walker.layers("evaluate layers", work):
            hidden.after.fill(walker.advance(layer, states) for states in hidden.before)
            work.state["cost"] = meter.to_dict()
        norm, head = walker.head()
        # One process evaluates, whoever trained.
        metric = Perplexity(sync_on_compute=False).to(walker.device)
        for states, ids in zip(hidden.before, windows.tokens, strict=True):
            metric.update(walker.logits(norm, head, states), ids.unsqueeze(0).to(walker.device))
    value = metric.compute().item()
    log.info("perplexity of %s: %.3f (%s)", checkpoint.folder, value, said(asdict(spec)))
    return {
        "perplexity": value,
        **settings,
        "threads": torch.get_num_threads(),
        "tokens": int(metric.tokens),
        "text_sha256": windows.text_sha256,
        "cost": meter.to_dict(),
    }
