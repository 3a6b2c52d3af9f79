"""Whole texts through the export and through torch: prefill, decoding, a chunk, two texts of which one is padded.

torch sees each text at once, so the export's tokens one by one are compared with a prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from kurtail_onnx.graph.cache import CachePart
from kurtail_onnx.graph.model import cache_parts
from kurtail_onnx.profiles import Profile
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import open_session
from kurtail_onnx.settings import Settings
from kurtail_onnx.verify.codes import codes_in
from kurtail_onnx.verify.reference import cached_codes, whole_reference
from kurtail_pl.artefact.source import Source
from kurtail_pl.metrics import Perplexity
from kurtail_pl.progress import track
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.positions import steady_positions

TOKENS = 24
"""At most this many tokens of a text are compared."""
PADDING = 5
"""The second text of the batch is padded by this many tokens."""
WINDOWS = TextSpec(windows=2, seqlen=512)
"""Exports in double are compared on this much real text."""


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
        perplexity: of the text.
        perplexity_error: difference from torch's, relative.
    """

    tokens: int
    equal_tokens: int
    logits_error: float
    largest_logit: float
    codes: int
    codes_differing: int
    perplexity: float
    perplexity_error: float


@dataclass(frozen=True)
class Scenario:
    """Texts ``[batch, tokens]``, their mask, and the tokens of each of the export's steps."""

    ids: Tensor
    mask: Tensor
    steps: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and mask of each step."""
        return zip(*(torch.split(x, list(self.steps), dim=1) for x in (self.ids, self.mask)), strict=True)


def scenarios(config: PretrainedConfig) -> dict[str, Scenario]:
    """Every way of feeding one text, and a batch of two, one padded, in one prefill.

    No text is longer than one whose tokens have the same angles however it is fed.
    """
    tokens = min(TOKENS, steady_positions(config))
    half, third = tokens // 2, tokens // 3
    steps = {"prefill": (tokens,), "decode": (tokens - half, *[1] * half), "chunk": (third, third, tokens - 2 * third)}
    ids = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : min(PADDING, half)] = 0
    single = {name: Scenario(ids[:1], mask[:1], counts) for name, counts in steps.items()}
    return {**single, "batch": Scenario(ids, mask, (tokens,))}


def windows(export: Export, source: Source) -> dict[str, Scenario]:
    """Windows of real text, no longer than the model's positions, at once, and the first one token by token."""
    length = min(WINDOWS.seqlen, steady_positions(source.config))
    ids = cut_windows(export, replace(WINDOWS, seqlen=length), "evaluation").tokens
    first, second = ids[:1], ids[1:]
    mask = torch.ones_like(first)
    return {
        "window_0": Scenario(first, mask, (length,)),
        "window_1": Scenario(second, mask, (length,)),
        "window_0_by_token": Scenario(first, mask, (1,) * length),
    }


def compare_texts(
    export: Export, source: Source, spec: Settings, todo: Mapping[str, Scenario], profile: Profile = "exact"
) -> dict[str, TextAgreement]:
    """Compare every scenario; the whole model is in memory, first torch's and then the export's."""
    expected = _by_torch(source, spec, todo)
    session = open_session(export.model, profile, threads=1)
    agreements = {}
    for name, scenario in track(list(todo.items()), "check texts"):
        decoder = Decoder(export, session, batch=len(scenario.ids))
        pieces = [decoder.forward(ids.numpy(), mask.numpy()) for ids, mask in scenario.pieces()]
        logits, codes = expected[name]
        found = {key: codes_in(decoder.cache()[key], part) for key, part in _packed(source, spec).items()}
        differing = [found[key] != codes[key] for key in found]
        agreements[name] = _agreement(logits, np.concatenate(pieces, axis=1), differing, scenario)
    return agreements


def _packed(source: Source, spec: Settings) -> dict[str, CachePart]:
    """The cache inputs that hold codes."""
    parts = [part for part in cache_parts(source, spec) if part.codes]
    return {part.arrays[0].past(layer): part for layer in range(len(source.layers)) for part in parts}


@torch.no_grad()
def _by_torch(
    source: Source, spec: Settings, todo: Mapping[str, Scenario]
) -> dict[str, tuple[NDArray[Any], dict[str, NDArray[Any]]]]:
    """Logits of each scenario, and its codes by the names of the cache inputs."""
    model, parts = whole_reference(source, spec), [part for part in cache_parts(source, spec) if part.codes]
    results = {}
    for name, scenario in todo.items():
        ids, mask, cache = scenario.ids, scenario.mask, DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        codes = {}
        for index, layer in enumerate(layers_of(model, source.architecture)):
            attention = layer.get_submodule(source.architecture.attention)
            states = cached_codes(attention, cache, index)
            for part in parts:
                codes[part.arrays[0].past(index)] = torch.cat([states[name] for name in part.states], 1).numpy()
        results[name] = output.logits.numpy(), codes
    return results


def _agreement(
    expected: NDArray[Any], found: NDArray[Any], differing: list[NDArray[np.bool_]], scenario: Scenario
) -> TextAgreement:
    real = scenario.mask.numpy() > 0
    perplexity, torchs = (_perplexity(logits, scenario) for logits in (found, expected))
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
        perplexity=perplexity,
        perplexity_error=abs(perplexity / torchs - 1),
    )


def _perplexity(logits: NDArray[Any], scenario: Scenario) -> float:
    metric = Perplexity()
    for row, ids, mask in zip(torch.from_numpy(logits), scenario.ids, scenario.mask, strict=True):
        metric.update(row[mask > 0][None], ids[mask > 0][None])
    return float(metric.compute().item())
