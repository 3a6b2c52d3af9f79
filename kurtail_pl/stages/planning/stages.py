"""What each stage takes: its own work, and what the methods in it say of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kurtail_pl.methods.cost import FLOAT16, FLOAT32, FLOAT64, Cost
from kurtail_pl.stages.fusion.passes import ROWS
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.planning.run import Run, StagePlan, tokens_of
from kurtail_pl.stages.quantization import QuantizeSpec, sensitivity
from kurtail_pl.stages.quantization.moments import FLOAT64_WIDTH
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.joining import room_for

SEARCH_BYTES = 8 * FLOAT32 << 25
"""The search of a grid holds so much on CUDA: eight float32 copies of the values that it takes at once."""
JOINED = 2
"""Codes are written in parts, and joined into files while these are there."""
ROUNDING_PASSES = 20
"""What is rotated and rounded is passed over so often, to measure the error of that."""


def capture(run: Run, text: TextSpec, store: int) -> StagePlan:
    """The text through the model, and rows of activations written."""
    s, value = run.sizes, run.sizes.value
    return run.stage(
        "capture",
        run.states(text),
        max(run.read(s.embedding, s.stored, value), run.read(s.layer, s.stored, value) + run.window(text)),
        max(s.embedding, s.layer) * value + s.wide * s.stored + run.window(text),
        store + run.states(text),
        s.forward(tokens_of(text), text.seqlen),
        0.0,
        "fewer windows or rows (data.init_args.capture)",
    )


def fuse(run: Run, scales: ScaleSpec | None, signs: SignSpec | None) -> StagePlan:
    """One layer in float64 at a time."""
    s = run.sizes
    square = s.hidden**2 * FLOAT64
    # What was read is let go of before rows are folded, four blocks of them at once, or the widest linear turned, whose
    # online rotation holds three copies beside it.
    rows = s.embedding * FLOAT32 + 4 * ROWS * s.hidden * FLOAT64
    turned = s.layer * FLOAT64 + 3 * s.wide * FLOAT64
    # Float64 products take twice as long.
    flops, states, passes = 2 * 2.0 * s.hidden * (s.stack + 2 * s.embedding), 0, 0.0
    if scales is not None:
        measured = tokens_of(scales.text)
        states = 2 * measured * s.hidden * FLOAT64
        turned = max(turned, s.layer * FLOAT64 + 6 * scales.text.seqlen * s.widest * FLOAT64)
        flops += 2 * s.forward(measured, scales.text.seqlen)
        if scales.search is not None:
            # Each layer is copied for an alpha, its weights rounded, and every window goes through it once more.
            tries = len(scales.search.alphas)
            flops += (1 + tries) * s.forward(measured, scales.text.seqlen)
            passes += ROUNDING_PASSES * float(tries * s.stack)
    if signs is not None:
        # Every window goes twice through each layer, the second time with the candidates behind what R4 and R5 turn.
        chosen = tokens_of(signs.text)
        states = max(states, run.states(signs.text))
        flops += 2 * s.forward(chosen, signs.text.seqlen)
        passes = ROUNDING_PASSES * float(signs.candidates * chosen * s.layers * (s.attention + s.widest))
    ends, layer = (run.read(size, s.stored, wanted) for size, wanted in ((s.embedding, FLOAT32), (s.layer, FLOAT64)))
    return run.stage(
        "fuse",
        states,
        square + max(ends, rows, layer, turned),
        3 * square + max(rows, turned),
        room_for(FLOAT32 * size for size in (*2 * [s.embedding], *s.layers * [s.stack // s.layers])) + states,
        flops,
        passes,
        "a disk or machine with more room: fusion holds one layer in float64",
    )


def quantize(run: Run, spec: QuantizeSpec) -> StagePlan:
    """Windows through each layer while its weights are solved, one after the other."""
    s, value = run.sizes, run.sizes.value
    calibration = tokens_of(spec.text) if spec.needs_inputs else 0
    models = 2 if spec.needs_float_model else 1
    costs = [method.cost(s) for method in spec.methods]
    measured = sensitivity.cost(s) if spec.bits is not None else Cost()
    kept, beside = sum(cost.states for cost in costs), sum(cost.disk for cost in costs)
    if calibration:
        kept += models * run.states(spec.text) + calibration * s.widest * value
    embedding = s.embedding * FLOAT32
    codes = _bytes_of_codes(s.layer, spec)
    solved = max(_solving(run, spec, costs, codes), codes + max((cost.memory for cost in costs), default=0))
    again = sum(cost.again for cost in costs)
    flops = (models + again) * s.forward(calibration, spec.text.seqlen) + measured.flops
    flops += sum(cost.flops for cost in costs) + (2 * 2.0 * calibration + s.widest) * s.layers * s.active
    if spec.by_attention:
        # Once more to the scores.
        flops += calibration * s.layers * (2.0 * s.hidden * s.attention + 2.0 * spec.text.seqlen * s.attention)
    return run.stage(
        "quantize",
        kept,
        max(embedding + s.embedding * FLOAT16, solved, measured.before),
        max(embedding, solved + run.window(spec.text)) + SEARCH_BYTES,
        JOINED * (_bytes_of_codes(s.stack, spec) + 2 * s.embedding * FLOAT16 + beside) + kept + measured.states,
        flops,
        sum(cost.passes for cost in costs),
        "fewer calibration windows (quantization.text.windows)",
    )


def _bytes_of_codes(numbers: int, spec: QuantizeSpec) -> int:
    """Of so many weights as the artefact has them, float ones in float16."""
    weights = spec.scheme.weights
    return numbers * FLOAT16 if weights is None else math.ceil(numbers * weights.average_bits / 8)


def _solving(run: Run, spec: QuantizeSpec, costs: Sequence[Cost], codes: int) -> int:
    """Bytes of a layer whose weights become codes, and of what is held beside it."""
    s, value = run.sizes, run.sizes.value
    # Codes of what is solved already, beside the widest linear, or all experts still to come.
    unsolved = s.layer * value if s.active < s.layer else codes + s.wide * value
    if spec.needs_float_model:
        unsolved = s.layer * value + codes  # The float model's layer lets go of its weights at the end.
    if not spec.needs_inputs:
        return max(s.layer * value, unsolved)
    copies = max(2, *(cost.copies for cost in costs))
    return max(
        unsolved + _hessian(s.widest, costs) + copies * s.wide * FLOAT32, s.layer * value + _hessian(s.hidden, costs)
    )


def _hessian(width: int, costs: Sequence[Cost]) -> int:
    """Bytes of a Hessian and what is held beside it at most, of its size."""
    return max(cost.hessian(width, width <= FLOAT64_WIDTH) for cost in costs)


def evaluate(run: Run, text: TextSpec) -> StagePlan:
    """The text through the artefact, to the logits."""
    s, value, tokens = run.sizes, run.sizes.value, tokens_of(text)
    logits, packed = 2 * text.seqlen * run.vocabulary * FLOAT32, s.layer * (value + 1)
    return run.stage(
        "evaluate",
        run.states(text),
        max(run.read(s.embedding, FLOAT16, value) + logits, packed + run.window(text)),
        max(s.embedding * (value + FLOAT16) + logits, packed + run.window(text)),
        run.states(text),
        s.forward(tokens, text.seqlen) + 2.0 * tokens * s.embedding,
        0.0,
        "shorter windows (evaluation text.seqlen)",
    )
