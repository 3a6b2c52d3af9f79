"""Whole texts through the export and through torch: prefill, decoding, a chunk, two texts of which one is padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kurtail_onnx.graph.model import cache_parts
from kurtail_onnx.graph.source import Source
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.profiles import Profile
from kurtail_onnx.run.session import open_session
from kurtail_onnx.spec import ExportSpec
from kurtail_onnx.verify.codes import codes_in
from kurtail_onnx.verify.reference import cached_codes, whole_reference
from kurtail_pl.surgery.equip import layers_of

TOKENS = 24
SCENARIOS: dict[str, tuple[int, ...]] = {"prefill": (24,), "decode": (12, *[1] * 12), "chunk": (8, 8, 8)}
"""Tokens of each step."""
PADDING = 5
"""Padded tokens of the second text of the batch."""


@dataclass(frozen=True)
class TextAgreement:
    """How far the logits and the cache of one or two texts are from torch's.

    Attributes:
        tokens: compared, padding left out.
        equal_tokens: those before the first one of their text that has another code in the cache; what follows depends
            on that code.
        logits_error: largest difference of their logits.
        largest_logit: of torch's, for comparison.
        codes: of keys and values, compared.
        codes_differing: those that are not equal.
    """

    tokens: int
    equal_tokens: int
    logits_error: float
    largest_logit: float
    codes: int
    codes_differing: int


@torch.no_grad()
def compare_texts(
    export: Export, source: Source, spec: ExportSpec, profile: Profile = "exact"
) -> dict[str, TextAgreement]:
    """Compare every scenario, and a batch of two texts, one padded, in one prefill; the whole model is in memory."""
    model, session = whole_reference(source, spec), open_session(export.model, profile, threads=1)
    ids = torch.randint(source.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :PADDING] = 0
    scenarios = {name: (ids[:1], padded[:1], steps) for name, steps in SCENARIOS.items()}
    scenarios["batch"] = (ids, padded, (TOKENS,))
    agreements = {}
    for name, (texts, mask, steps) in scenarios.items():
        cache, decoder = DynamicCache(), Decoder(export, session, batch=len(texts))
        expected, found = _logits(model, cache, decoder, texts, mask, steps)
        differing = _differing_codes(model, cache, decoder, source, spec)
        agreements[name] = _agreement(expected, found, differing, mask.numpy() > 0)
    return agreements


def _logits(
    model: PreTrainedModel, cache: DynamicCache, decoder: Decoder, ids: Tensor, mask: Tensor, steps: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits ``[batch, tokens, vocabulary]`` of torch and of the export; fills both caches."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, found, done = [], [], 0
    for count in steps:
        now = slice(done, done + count)
        found.append(decoder.forward(ids[:, now].numpy(), mask[:, now].numpy()))
        output = model(
            input_ids=ids[:, now],
            attention_mask=mask[:, : now.stop],
            position_ids=positions[:, now],
            past_key_values=cache,
        )
        expected.append(output.logits.numpy())
        done = now.stop
    return np.concatenate(expected, axis=1), np.concatenate(found, axis=1)


def _differing_codes(
    model: PreTrainedModel, cache: DynamicCache, decoder: Decoder, source: Source, spec: ExportSpec
) -> list[NDArray[np.bool_]]:
    """Which codes differ, ``[batch, kv_heads, tokens, head_dim]`` for keys and values of every layer."""
    found, differing = decoder.cache(), []
    for index, layer in enumerate(layers_of(model, source.architecture)):
        expected = cached_codes(layer.get_submodule(source.architecture.attention), cache, index)
        for part in cache_parts(source, spec):
            if part.packed and part.name in expected:
                codes = codes_in(found[part.arrays[0].past(index)], part)
                differing.append(codes != expected[part.name].numpy())
    return differing


def _agreement(
    expected: NDArray[Any], found: NDArray[Any], differing: list[NDArray[np.bool_]], real: NDArray[np.bool_]
) -> TextAgreement:
    in_token = np.zeros_like(real)
    for codes in differing:
        in_token |= codes.any(axis=(1, 3))
    equal = real & ~np.logical_or.accumulate(in_token & real, axis=1)
    errors = np.abs(found - expected).max(-1)
    return TextAgreement(
        tokens=int(real.sum()),
        equal_tokens=int(equal.sum()),
        logits_error=float(errors[equal].max(initial=0.0)),
        largest_logit=float(np.abs(expected[real]).max()),
        codes=sum(int(codes.shape[1] * codes.shape[3] * real.sum()) for codes in differing),
        codes_differing=sum(int((codes.swapaxes(1, 2)[real]).sum()) for codes in differing),
    )
