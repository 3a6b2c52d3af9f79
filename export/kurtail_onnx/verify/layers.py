"""Every decoder layer of an export against torch's, each on the inputs that torch computed.

Rounding to 4 bits is chaotic: two exact implementations add in another order, a value that lies on the border between
two codes falls on the other side, and from there on the texts' logits differ by as much as they would for any other
rounding. torch differs from itself in the same way when a prompt is fed in two pieces. What two implementations of one
model must share is each layer's function, so each layer is compared alone, on equal inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from kurtail_onnx.graph.builder import FLOATS
from kurtail_onnx.graph.cache import CachePart
from kurtail_onnx.graph.model import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, cache_parts, hidden_name
from kurtail_onnx.profiles import Profile
from kurtail_onnx.settings import Precision, Settings
from kurtail_onnx.verify.codes import codes_in
from kurtail_onnx.verify.head import HeadAgreement, compare_heads, mirrored
from kurtail_onnx.verify.pieces import Pieces
from kurtail_onnx.verify.reference import cached_codes, empty_reference
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.families import number_of
from kurtail_pl.surgery.positions import steady_positions

BATCH, STEPS = 2, (9, 1, 1, 1, 6, 1, 1, 1)
"""Texts, and tokens of each step: prefill, decoding, a chunk, decoding; fewer where the model has fewer positions."""

ROUNDING: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2}
"""A token's hidden states that differ by less than this, relative to the layer's largest, differ by float rounding."""


@dataclass(frozen=True)
class LayerAgreement:
    """How far a layer of the export is from torch's, over all tokens of all texts.

    Attributes:
        tokens: compared.
        tokens_on_a_border: those where some value was rounded to another code: their hidden states differ by more than
            float rounding.
        hidden_error: largest difference of the other tokens' hidden states, relative to the layer's largest.
        codes: of keys and values, compared.
        codes_differing: those that are not equal.
        largest_code_difference: in steps.
    """

    tokens: int
    tokens_on_a_border: int
    hidden_error: float
    codes: int
    codes_differing: int
    largest_code_difference: int


@torch.no_grad()
def compare_layers(
    folder: Path, source: Source, spec: Settings, profile: Profile = "exact"
) -> tuple[list[LayerAgreement], HeadAgreement]:
    """Compare all decoder layers, one in memory at a time, and the head.

    Args:
        folder: of the export.
        source: its artefact.
        spec: choices of the export.
        profile: how the export is run.

    Returns:
        The agreement of each layer, and of what both heads make of the same hidden states.

    Raises:
        CheckFailed: when a layer of the export gives what is no number.
    """
    walker = Walker(source.checkpoint, empty_reference(source, spec))
    pieces = Pieces(folder, FLOATS[spec.dtype], profile)
    steps = steps_within(steady_positions(source.config))
    ids = torch.randint(source.config.vocab_size, (BATCH, sum(steps)), generator=torch.Generator().manual_seed(0))
    embedding = walker.embedding()
    hidden = [walker.embed(embedding, text.unsqueeze(0)) for text in ids]
    embedding.to("meta")
    agreements = []
    for index, layer in walker.layers("check layers"):
        caches = [DynamicCache() for _ in hidden]
        after = [
            layer(states, past_key_values=cache, **walker.positions(layer, states))
            for states, cache in zip(hidden, caches, strict=True)
        ]
        with pieces.layer(index) as session:
            found, cache = run_layer(session, index, torch.cat(hidden).numpy(), FLOATS[spec.dtype].numpy(), steps)
        if not np.isfinite(found).all():
            raise CheckFailed(
                f"decoder layer {index} of the export gives values that are nan or infinite in {spec.dtype}, where "
                "torch's are numbers; export with --to.dtype fp32"
            )
        attention = layer.get_submodule(source.architecture.attention)
        by_text = [cached_codes(attention, torch_cache, index) for torch_cache in caches]
        differences = _code_differences(cache, index, cache_parts(source, spec), by_text)
        agreements.append(_agreement(torch.cat(after).numpy(), found, differences, ROUNDING[spec.dtype]))
        hidden = after
    states = torch.cat(hidden)
    with pieces.head(len(agreements)) as session:
        (logits,) = session.run(None, {hidden_name(len(agreements)): states.numpy().astype(FLOATS[spec.dtype].numpy())})
    norm, head = walker.head()
    divisor = number_of(walker.checkpoint.config, walker.architecture.logits_divisor)
    return agreements, compare_heads(mirrored(head, spec.head), norm(states), logits, divisor)


def steps_within(positions: int) -> tuple[int, ...]:
    """`STEPS`, the first cut short and the last ones left out where all are more tokens than positions."""
    steps = [min(STEPS[0], positions)]
    for count in STEPS[1:]:
        if sum(steps) + count <= positions:
            steps.append(count)
    return tuple(steps)


def run_layer(
    session: Any, index: int, hidden: NDArray[Any], dtype: np.dtype[Any], steps: Sequence[int] = STEPS
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Feed hidden states ``[batch, tokens, hidden]`` through a layer in several steps; its output and its cache."""
    batch, shapes = len(hidden), {value.name: (value.shape, value.type) for value in session.get_inputs()}
    cache = {
        name: np.zeros((batch, shape[1], 0, shape[3]), np.uint8 if kind == "tensor(uint8)" else dtype)
        for name, (shape, kind) in shapes.items()
        if name.startswith("past_key_values.")
    }
    outputs, done = [], 0
    for count in steps:
        now = slice(done, done + count)
        feed = {
            INPUT_IDS: np.zeros((batch, count), np.int64),
            ATTENTION_MASK: np.ones((batch, now.stop), np.int64),
            POSITION_IDS: np.arange(now.start, now.stop)[None].repeat(batch, 0),
            hidden_name(index): hidden[:, now].astype(dtype),
        }
        output, *presents = session.run(None, {name: array for name, array in feed.items() if name in shapes} | cache)
        outputs.append(output.astype(np.float32))
        cache, done = dict(zip(cache, presents, strict=True)), now.stop
    return np.concatenate(outputs, axis=1), cache


def _code_differences(
    cache: dict[str, NDArray[Any]], index: int, parts: Iterable[CachePart], by_text: Sequence[dict[str, Tensor]]
) -> list[NDArray[np.int64]]:
    """Of each part of a layer's cache from the codes of each text, in steps."""
    expected = {name: torch.cat([text[name] for text in by_text]).numpy().astype(np.int64) for name in by_text[0]}
    packed = {part: codes_in(cache[part.arrays[0].past(index)], part) for part in parts if part.codes}
    return [np.abs(codes - np.concatenate([expected[n] for n in part.states], 1)) for part, codes in packed.items()]


def _agreement(
    expected: NDArray[Any], found: NDArray[Any], differences: list[NDArray[np.int64]], rounding: float
) -> LayerAgreement:
    errors = np.abs(found - expected).max(-1) / np.abs(expected).max()
    smooth = errors < rounding
    return LayerAgreement(
        tokens=errors.size,
        tokens_on_a_border=int((~smooth).sum()),
        hidden_error=float(errors[smooth].max(initial=0.0)),
        codes=sum(d.size for d in differences),
        codes_differing=sum(int((d > 0).sum()) for d in differences),
        largest_code_difference=max((int(d.max()) for d in differences), default=0),
    )
