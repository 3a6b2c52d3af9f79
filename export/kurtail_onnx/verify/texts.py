"""Whole texts through the export and through torch: prefill, decoding, a chunk, two texts of which one is padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from kurtail_onnx.graph.cache import CachePart
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
STEPS: dict[str, tuple[int, ...]] = {"prefill": (24,), "decode": (12, *[1] * 12), "chunk": (8, 8, 8)}
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


@dataclass(frozen=True)
class Scenario:
    """Texts ``[batch, tokens]``, their mask, and the tokens of each step."""

    ids: Tensor
    mask: Tensor
    steps: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and mask of each step."""
        return zip(*(torch.split(x, list(self.steps), dim=1) for x in (self.ids, self.mask)), strict=True)


def scenarios(vocabulary: int) -> dict[str, Scenario]:
    """Every way of feeding one text, and a batch of two, one padded, in one prefill."""
    ids = torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    single = {name: Scenario(ids[:1], mask[:1], steps) for name, steps in STEPS.items()}
    return {**single, "batch": Scenario(ids, mask, (TOKENS,))}


def compare_texts(
    export: Export, source: Source, spec: ExportSpec, profile: Profile = "exact"
) -> dict[str, TextAgreement]:
    """Compare every scenario; the whole model is in memory, first torch's and then the export's."""
    todo = scenarios(source.config.vocab_size)
    expected = _by_torch(source, spec, todo)
    session = open_session(export.model, profile, threads=1)
    agreements = {}
    for name, scenario in todo.items():
        decoder = Decoder(export, session, batch=len(scenario.ids))
        pieces = [decoder.forward(ids.numpy(), mask.numpy()) for ids, mask in scenario.pieces()]
        logits, codes = expected[name]
        found = {key: codes_in(decoder.cache()[key], part) for key, part in _packed(source, spec).items()}
        differing = [found[key] != codes[key] for key in found]
        agreements[name] = _agreement(logits, np.concatenate(pieces, axis=1), differing, scenario.mask.numpy() > 0)
    return agreements


def _packed(source: Source, spec: ExportSpec) -> dict[str, CachePart]:
    """The cache inputs that hold codes."""
    parts = [part for part in cache_parts(source, spec) if part.packed and part.quantizer is not None]
    return {part.arrays[0].past(layer): part for layer in range(len(source.layers)) for part in parts}


@torch.no_grad()
def _by_torch(
    source: Source, spec: ExportSpec, todo: dict[str, Scenario]
) -> dict[str, tuple[NDArray[Any], dict[str, NDArray[Any]]]]:
    """Logits of each scenario, and its codes by the names of the cache inputs."""
    model = whole_reference(source, spec)
    results = {}
    for name, scenario in todo.items():
        cache, logits, seen = DynamicCache(), [], scenario.mask[:, :0]
        for ids, mask in scenario.pieces():
            seen = torch.cat([seen, mask], dim=1)
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache)
            logits.append(output.logits.numpy())
        codes = {}
        for index, layer in enumerate(layers_of(model, source.architecture)):
            attention = layer.get_submodule(source.architecture.attention)
            for part, tensor in cached_codes(attention, cache, index).items():
                codes[f"past_key_values.{index}.{part}"] = tensor.numpy()
        results[name] = np.concatenate(logits, axis=1), codes
    return results


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
