"""Plan: what each stage of a recipe will take, from the model's configuration alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from kurtail_pl.stages.capture import CaptureSpec
from kurtail_pl.stages.fuse import ROWS
from kurtail_pl.stages.quantize import QuantizeSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import Shape, store_bytes
from kurtail_pl.storage.files import gigabytes
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import head_dim_of

TOKENIZER = 50_000_000
"""Bytes that a tokenizer takes once it is read, about."""
WHOLE_TEXT = 350_000
"""Tokens of a text that is taken whole, about: the test split of WikiText-2 has so many, and a plan reads no text."""
FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
SEARCH_PASSES = 80 * 10
"""Passes over a weight that the search of its grid makes: 80 clip ratios, about ten elementwise steps each."""
CAYLEY_PRODUCTS = 12
"""Square matrix products of one Cayley step: the skew direction, five fixed-point passes, the polish."""

KEPT_HIDDEN, KEPT_WIDE = 14, 6
"""Values that the backward pass keeps for each token and layer, in widths of the residual stream and of the MLP."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and widths of a model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        widest: width of the widest linear's input, which decides the largest Hessian.
        layer: parameters of one decoder layer.
        active: of these, the ones that one token meets (fewer, in a mixture).
        attention: query heads times their width.
        embedding: parameters of the embedding; the head has as many.
        stored: bytes of a parameter on disk.
    """

    layers: int
    hidden: int
    widest: int
    layer: int
    active: int
    attention: int
    embedding: int
    stored: int

    def forward(self, tokens: int, seqlen: int) -> float:
        """FLOPs of all decoder layers on so many tokens in windows of a length."""
        return tokens * self.layers * (2.0 * self.active + 2.0 * seqlen * self.attention)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Sizes from a configuration; raises UnsupportedArchitecture for an unknown family."""
    architecture = architecture_of(config)
    hidden, head_dim, width = config.hidden_size, head_dim_of(config), getattr(config, architecture.mlp_width)
    attention, cache = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    mlp = 3 * hidden * width
    experts = (getattr(config, "num_local_experts", None) or config.num_experts) if architecture.experts else 1
    chosen = config.num_experts_per_tok if architecture.experts else 1
    heads = 2 * hidden * (attention + cache)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        widest=max(width, attention, hidden),
        layer=heads + experts * mlp,
        active=heads + chosen * mlp,
        attention=attention,
        embedding=config.vocab_size * hidden,
        stored=dtype.itemsize,
    )


@dataclass(frozen=True)
class ProxyLearning:
    """Rotations learned from cached activations: iterations, and rows of each site in a batch."""

    steps: int
    batch_rows: int


@dataclass(frozen=True)
class WholeModelLearning:
    """Rotations learned through the whole model: iterations, windows in a batch and their tokens."""

    steps: int
    batch_windows: int
    seqlen: int


Learning = ProxyLearning | WholeModelLearning


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Args:
        stage: its verb.
        memory: bytes of resident memory at the peak, the program's own included.
        disk: bytes written, those that are removed at the end included.
        flops: floating-point operations in matrix products.
        passes: values touched by elementwise work that takes longer than the products.
        knob: what makes it smaller.
    """

    stage: str
    memory: int
    disk: int
    flops: float
    passes: float
    knob: str


def plan(
    config: PretrainedConfig,
    capture: CaptureSpec,
    learning: Learning,
    quantize: QuantizeSpec,
    evaluation: TextSpec,
    program: int,
) -> list[StagePlan]:
    """The stages of a recipe, in their order.

    Args:
        config: of the model.
        capture: what is captured.
        learning: how rotations are learned.
        quantize: how weights are quantized.
        evaluation: evaluation text.
        program: bytes that the program itself takes, libraries included.
    """
    s = sizes_of(config)
    shape = Shape(s.layers, s.hidden, config.num_key_value_heads, head_dim_of(config))
    program += TOKENIZER
    # A tensor is read through a memory map and converted, and copied once more to be written; the next layer is read
    # while one computes. What is float32 already is used where it is mapped, an embedding row by row.
    converted = s.stored != FLOAT32
    ends = s.embedding * (s.stored + FLOAT32) if converted else 0
    layer = s.layer * (2 * s.stored + FLOAT32)
    written = s.embedding * 2 * FLOAT32

    def tokens_of(text: TextSpec) -> int:
        return WHOLE_TEXT if text.windows is None else text.windows * text.seqlen

    def states(text: TextSpec) -> int:
        return 2 * tokens_of(text) * s.hidden * FLOAT32

    def window(text: TextSpec) -> int:
        return 6 * text.seqlen * s.widest * FLOAT32

    text, tokens = capture.text, tokens_of(capture.text)
    store = store_bytes(shape, capture.known_rows or WHOLE_TEXT)
    calibration = tokens_of(quantize.text) if quantize.needs_inputs else 0
    inner = calibration * s.widest * FLOAT32
    hessians = 5 * s.widest**2 * FLOAT64 if calibration else 0
    kept = states(quantize.text) + inner if calibration else 0
    logits = 2 * evaluation.seqlen * config.vocab_size * FLOAT32
    artefact = s.layers * s.layer // 2 + 2 * s.embedding * FLOAT16
    half = s.embedding * FLOAT16
    evaluated = tokens_of(evaluation)
    wide = s.layer * (FLOAT64 + FLOAT32) + s.widest * s.hidden * FLOAT64
    return [
        StagePlan(
            "capture",
            program + states(text) + max(ends, layer + window(text)),
            store + states(text),
            s.forward(tokens, text.seqlen),
            0.0,
            "fewer windows or rows (data.init_args.capture)",
        ),
        _learn(s, learning, config.vocab_size, program),
        StagePlan(
            "fuse",
            program + max(ends + written + 4 * ROWS * s.hidden * FLOAT64, 2 * s.layer * s.stored + wide),
            (s.layers * s.layer + 2 * s.embedding) * FLOAT32,
            # Float64 products take twice as long.
            2 * 2.0 * s.hidden * (s.layers * s.layer + 2 * s.embedding),
            0.0,
            "a disk or machine with more room: fusion holds one layer in float64",
        ),
        StagePlan(
            "quantize",
            program + kept + max(s.embedding * FLOAT32 + 2 * half, s.layer * 3 * FLOAT32 + hessians),
            artefact + kept,
            s.forward(calibration, quantize.text.seqlen) + (2 * 2.0 * calibration + s.widest) * s.layers * s.active,
            SEARCH_PASSES * float(s.layers * s.layer) if quantize.scheme.weights is not None else 0.0,
            "fewer calibration windows (quantize.text.windows)",
        ),
        StagePlan(
            "evaluate",
            program + states(evaluation) + max(half + s.embedding * FLOAT32 + logits, s.layer * 2 * FLOAT32),
            states(evaluation),
            s.forward(evaluated, evaluation.seqlen) + 2.0 * evaluated * s.embedding,
            0.0,
            "shorter windows (evaluation text.seqlen)",
        ),
    ]


def _learn(s: Sizes, learning: Learning, vocabulary: int, program: int) -> StagePlan:
    square = s.hidden**2
    cayley = learning.steps * CAYLEY_PRODUCTS * 2.0 * s.hidden**3
    disk = 3 * square * FLOAT32
    if isinstance(learning, ProxyLearning):
        batch = 2 * s.layers * learning.batch_rows * s.hidden * FLOAT32
        products = learning.steps * 3.0 * 4 * s.layers * learning.batch_rows * square
        memory = program + 3 * batch + 12 * square * FLOAT32
        return StagePlan("learn", memory, disk, products + cayley, 0.0, "smaller batches (data.init_args.batch_rows)")
    tokens = learning.batch_windows * learning.seqlen
    # Weights as they are and as rotated, two steps of them; and what the backward pass needs of every layer.
    weights = 3 * s.layers * s.layer + 2 * s.embedding
    kept = s.layers * tokens * (KEPT_HIDDEN * s.hidden + KEPT_WIDE * s.widest) + 4 * tokens * vocabulary
    turned = 2.0 * s.layers * s.layer * s.hidden
    forward = s.forward(tokens, learning.seqlen) + 2.0 * tokens * s.embedding + turned
    return StagePlan(
        "learn",
        program + (weights + kept) * FLOAT32 + 12 * square * FLOAT32,
        disk,
        learning.steps * 3 * forward + cayley,
        0.0,
        "smaller batches or shorter windows (data.init_args); this method needs the whole model",
    )


@dataclass(frozen=True)
class Speed:
    """How fast this machine is: FLOPs of matrix products and values of elementwise work, both a second."""

    flops: float
    passes: float

    def seconds(self, stage: StagePlan) -> float:
        """Estimate for a stage."""
        return stage.flops / self.flops + stage.passes / self.passes


def probe() -> Speed:
    """Measure this machine for about half a second."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    return Speed(_rate(lambda: a @ b, 2.0 * 512 * 1024 * 1024), _rate(lambda: a.mul_(1.0), a.numel()))


def _rate(work: Callable[[], object], amount: float) -> float:
    work()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 0.25:
        work()
        done += 1
    return done * amount / (time.perf_counter() - started)


def misfits(stages: list[StagePlan], memory: int | None, disk: int) -> list[str]:
    """What does not fit into so many bytes of memory (None: unknown) and of disk, each with the knob to turn."""
    found = [
        f"{stage.stage} needs {gigabytes(stage.memory)} of memory and {gigabytes(memory)} are free: {stage.knob}"
        for stage in stages
        if memory is not None and stage.memory > memory
    ]
    needed = sum(stage.disk for stage in stages)
    if needed > disk:
        largest = max(stages, key=lambda stage: stage.disk)
        found.append(
            f"the stages need {gigabytes(needed)} of disk and {gigabytes(disk)} are free; "
            f"{largest.stage} takes most: {largest.knob}"
        )
    return found


def table(stages: list[StagePlan], speed: Speed) -> str:
    """The plan for people."""
    widths = (8, 9, 9, 9, 8)
    head = ("stage", "memory", "disk", "TFLOPs", "seconds")
    lines = [
        "| " + " | ".join(name.ljust(width) for name, width in zip(head, widths, strict=True)) + " |",
        "| " + " | ".join("-" * width for width in widths) + " |",
    ]
    for stage in stages:
        cells = (
            stage.stage.ljust(8),
            gigabytes(stage.memory).rjust(9),
            gigabytes(stage.disk).rjust(9),
            f"{stage.flops / 1e12:.2f}".rjust(9),
            f"{speed.seconds(stage):.0f}".rjust(8),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
