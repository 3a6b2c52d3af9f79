"""Plan: what each stage of a recipe will take, from the model's configuration alone."""

from __future__ import annotations

from transformers import PretrainedConfig

from kurtail_pl.stages.capture.stage import CaptureSpec, shape_of
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.planning import stages
from kurtail_pl.stages.planning.learning import Learning
from kurtail_pl.stages.planning.run import WHOLE_TEXT, Run, StagePlan
from kurtail_pl.stages.planning.sizes import sizes_of
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import store_bytes
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.positions import positions_of, require_lengths

TOKENIZER = 50_000_000
"""Bytes that a tokenizer takes once it is read, about."""


def plan(
    config: PretrainedConfig,
    capture: CaptureSpec,
    learning: Learning,
    quantize: QuantizeSpec,
    evaluation: TextSpec,
    program: int,
    compute: Compute = AUTO,
    scales: ScaleSpec | None = None,
    signs: SignSpec | None = None,
) -> list[StagePlan]:
    """The stages of a recipe, in their order.

    Args:
        config: of the model.
        capture: what is captured.
        learning: how rotations are learned.
        quantize: how weights are quantized.
        evaluation: evaluation text.
        program: bytes that the program itself takes, libraries included.
        compute: device and floating-point type of the layers.
        scales: channels that are scaled when the rotations are fused.
        signs: how those of the online rotations are chosen then.

    Raises:
        ConfigError: when any windows are longer than the model's positions.
    """
    require_lengths(_lengths(capture, learning, quantize, evaluation, scales, signs), positions_of(config))
    sizes = sizes_of(config, compute.torch_dtype.itemsize)
    run = Run(sizes, config.vocab_size, program + TOKENIZER, compute)
    store = store_bytes(shape_of(config, capture.values), capture.known_rows or WHOLE_TEXT)
    return [
        stages.capture(run, capture.text, store),
        learning.plan(run),
        stages.fuse(run, scales, signs),
        stages.quantize(run, quantize),
        stages.evaluate(run, evaluation),
    ]


def _lengths(
    capture: CaptureSpec,
    learning: Learning,
    quantize: QuantizeSpec,
    evaluation: TextSpec,
    scales: ScaleSpec | None,
    signs: SignSpec | None,
) -> dict[str, int]:
    """Tokens in a window of each text that the stages read, by the setting that says it."""
    own = "quantization.clips.seqlen" if quantize.clips is not None else "quantization.transforms.seqlen"
    found = {
        "data.capture.text.seqlen": capture.text.seqlen,
        "data.text.seqlen": learning.seqlen,
        "evaluation.text.seqlen": evaluation.seqlen,
        "fusion.scales.text.seqlen": None if scales is None else scales.text.seqlen,
        "fusion.signs.text.seqlen": None if signs is None else signs.text.seqlen,
        "quantization.text.seqlen": quantize.text.seqlen if quantize.needs_text else None,
        own: None if quantize.own_windows is None else quantize.own_windows[1],
    }
    return {setting: seqlen for setting, seqlen in found.items() if seqlen is not None}
