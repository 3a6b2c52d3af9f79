"""Plan: what each stage of a recipe will take, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from kurtail_pl.stages.allocation import TOKENS, WINDOWS
from kurtail_pl.stages.capture import CaptureSpec, shape_of
from kurtail_pl.stages.fuse import ROWS
from kurtail_pl.stages.learned_clips import BATCH, ClipLearning
from kurtail_pl.stages.quantize import QuantizeSpec
from kurtail_pl.stages.scales import ScaleSpec
from kurtail_pl.stages.signs import SignSpec
from kurtail_pl.stages.sizes import Sizes, sizes_of
from kurtail_pl.stages.solver import FLOAT64_WIDTH
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import store_bytes
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.positions import positions_of, require_positions

TOKENIZER = 50_000_000
"""Bytes that a tokenizer takes once it is read, about."""
WHOLE_TEXT = 350_000
"""Tokens of a text that is taken whole, about: the test split of WikiText-2 has so many, and a plan reads no text."""
FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
SEARCH_BYTES = 8 * FLOAT32 << 25
"""Of the search on CUDA: eight float32 copies of the values that it takes at once."""
SEARCH_PASSES = 80 * 10
"""Passes over a weight that the search of its grid makes: 80 clip ratios, about ten elementwise steps each."""
ROUNDING_PASSES = 20
"""Passes over what is rotated and rounded, to measure the error of that."""
CAYLEY_PRODUCTS = 12
"""Square matrix products of one Cayley step: the skew direction, five fixed-point passes, the polish."""

JOINED = 2
"""Weights are written in parts, and joined into files while these are there."""
KEPT_HIDDEN, KEPT_WIDE = 14, 6
"""Values that the backward pass keeps for each token and layer, in widths of the residual stream and of the MLP."""


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
        memory: bytes of resident memory at the peak, the program's own and the hidden states included.
        disk: bytes written, those that are removed at the end included.
        flops: floating-point operations in matrix products.
        passes: values touched by elementwise work that takes longer than the products.
        knob: what makes it smaller.
        device: bytes of the CUDA device's memory at the peak; None where it computes on the CPU.
        states: those of the hidden states between layers; in memory-mapped files, they may stay on the disk instead.
    """

    stage: str
    memory: int
    disk: int
    flops: float
    passes: float
    knob: str
    device: int | None = None
    states: int = 0


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
    texts = [capture.text, evaluation, *(spec.text for spec in (scales, signs) if spec is not None)]
    texts += [quantize.text] if quantize.needs_text else []
    windowed = [*texts, learning if isinstance(learning, WholeModelLearning) else None, quantize.learn_clips]
    for windows in windowed:
        if windows is not None:
            require_positions(windows.seqlen, positions_of(config))
    run = _Run(sizes_of(config), config.vocab_size, program + TOKENIZER, compute)
    store = store_bytes(shape_of(config, capture.values), capture.known_rows or WHOLE_TEXT)
    return [
        _capture(run, capture.text, store),
        _learn(run, learning),
        _fuse(run, scales, signs),
        _quantize(run, quantize),
        _evaluate(run, evaluation),
    ]


@dataclass(frozen=True)
class _Run:
    """A model's sizes, and what runs it: the program's bytes, device and type."""

    sizes: Sizes
    vocabulary: int
    program: int
    compute: Compute

    @property
    def value(self) -> int:
        """Bytes of a value that layers compute with."""
        return self.compute.torch_dtype.itemsize

    def states(self, text: TextSpec) -> int:
        """Bytes of a text's hidden states, before a layer and after it."""
        return 2 * _tokens(text) * self.sizes.hidden * self.value

    def window(self, text: TextSpec) -> int:
        """Bytes that one window takes inside a layer."""
        return 6 * text.seqlen * self.sizes.widest * self.value

    def read(self, parameters: int, stored: int, wanted: int) -> int:
        """Bytes of a tensor read through a memory map; what is of the wanted type is used where it is mapped."""
        return parameters * (wanted if stored == wanted else stored + wanted)

    def stage(
        self, name: str, states: int, modules: int, device: int, disk: int, flops: float, passes: float, knob: str
    ) -> StagePlan:
        """A stage's plan from its own bytes: hidden states and modules on the CPU, or what the CUDA device holds."""
        s = self.sizes
        if not self.compute.on_cuda:
            return StagePlan(name, self.program + states + modules, disk, flops, passes, knob, states=states)
        # The CPU holds what is read ahead and what is written; what is computed with is the device's.
        ahead = max(2 * s.layer * FLOAT32, s.embedding * (s.stored + FLOAT32))
        return StagePlan(name, self.program + states + ahead, disk, flops, passes, knob, device, states)


def _tokens(text: TextSpec) -> int:
    return WHOLE_TEXT if text.windows is None else text.windows * text.seqlen


def _capture(run: _Run, text: TextSpec, store: int) -> StagePlan:
    s, value = run.sizes, run.value
    return run.stage(
        "capture",
        run.states(text),
        max(run.read(s.embedding, s.stored, value), run.read(s.layer, s.stored, value) + run.window(text)),
        max(s.embedding, s.layer) * value + s.wide * s.stored + run.window(text),
        store + run.states(text),
        s.forward(_tokens(text), text.seqlen),
        0.0,
        "fewer windows or rows (data.init_args.capture)",
    )


def _learn(run: _Run, learning: Learning) -> StagePlan:
    s, program, on_cuda = run.sizes, run.program, run.compute.on_cuda
    square = s.hidden**2
    cayley = learning.steps * CAYLEY_PRODUCTS * 2.0 * s.hidden**3
    disk = 3 * square * FLOAT32
    if isinstance(learning, ProxyLearning):
        batch = 2 * s.layers * learning.batch_rows * s.hidden * FLOAT32
        products = learning.steps * 3.0 * 4 * s.layers * learning.batch_rows * square
        taken = 3 * batch + 12 * square * FLOAT32
        memory, device = (program + batch, taken) if on_cuda else (program + taken, None)
        knob = "smaller batches (data.init_args.batch_rows)"
        return StagePlan("learn", memory, disk, products + cayley, 0.0, knob, device)
    tokens = learning.batch_windows * learning.seqlen
    # Weights as they are and as rotated, two steps of them; and what the backward pass needs of every layer.
    weights = 3 * s.stack + 2 * s.embedding
    kept = s.layers * tokens * (KEPT_HIDDEN * s.hidden + KEPT_WIDE * s.widest) + 4 * tokens * run.vocabulary
    turned = 2.0 * s.stack * s.hidden
    forward = s.forward(tokens, learning.seqlen) + 2.0 * tokens * s.embedding + turned
    taken = (weights + kept) * FLOAT32 + 12 * square * FLOAT32
    return StagePlan(
        "learn",
        # The whole model is read on the CPU first.
        program + (weights * FLOAT32 if on_cuda else taken),
        disk,
        learning.steps * 3 * forward + cayley,
        0.0,
        "smaller batches or shorter windows (data.init_args); this method needs the whole model",
        taken if on_cuda else None,
    )


def _fuse(run: _Run, scales: ScaleSpec | None, signs: SignSpec | None) -> StagePlan:
    s = run.sizes
    square = s.hidden**2 * FLOAT64
    # What was read is let go of before rows are folded, four blocks of them at once, or the widest linear turned, whose
    # online rotation holds three copies beside it.
    rows = s.embedding * FLOAT32 + 4 * ROWS * s.hidden * FLOAT64
    turned = s.layer * FLOAT64 + 3 * s.wide * FLOAT64
    # Float64 products take twice as long.
    flops, states, passes = 2 * 2.0 * s.hidden * (s.stack + 2 * s.embedding), 0, 0.0
    if scales is not None:
        measured = _tokens(scales.text)
        states = 2 * measured * s.hidden * FLOAT64
        turned = max(turned, s.layer * FLOAT64 + 6 * scales.text.seqlen * s.widest * FLOAT64)
        flops += 2 * s.forward(measured, scales.text.seqlen)
    if signs is not None:
        # Every window goes twice through each layer, the second time with the candidates behind what R4 and R5 turn.
        chosen = _tokens(signs.text)
        states = max(states, run.states(signs.text))
        flops += 2 * s.forward(chosen, signs.text.seqlen)
        passes = ROUNDING_PASSES * float(signs.candidates * chosen * s.layers * (s.attention + s.widest))
    ends, layer = (run.read(size, s.stored, wanted) for size, wanted in ((s.embedding, FLOAT32), (s.layer, FLOAT64)))
    return run.stage(
        "fuse",
        states,
        square + max(ends, rows, layer, turned),
        3 * square + max(rows, turned),
        JOINED * (s.stack + 2 * s.embedding) * FLOAT32 + states,
        flops,
        passes,
        "a disk or machine with more room: fusion holds one layer in float64",
    )


def _quantize(run: _Run, spec: QuantizeSpec) -> StagePlan:
    s, value = run.sizes, run.value
    calibration = _tokens(spec.text) if spec.needs_inputs else 0
    models = 2 if spec.needs_float_model else 1
    training = Training.of(s, spec.learn_clips, value)
    kept = training.states
    if calibration:
        kept += models * run.states(spec.text) + calibration * s.widest * value
    # The windows with each layer's noise and its negative, which on average go through half of the layers.
    copies = 1 + 2 * s.layers if spec.average_bits is not None else 0
    noisy = 2 * copies * WINDOWS * TOKENS * s.hidden * value
    felt = copies * (s.forward(WINDOWS * TOKENS, TOKENS) / 2 + 2.0 * WINDOWS * TOKENS * s.embedding)
    searched = spec.scheme.weights is not None and spec.scheme.weights.even
    embedding, solved = s.embedding * FLOAT32, max(_solving(run, spec), s.layer // 2 + training.memory)
    flops = models * s.forward(calibration, spec.text.seqlen) + felt
    flops += (2 * 2.0 * calibration + s.widest) * s.layers * s.active
    if spec.by_attention:
        # Once more to the scores.
        flops += calibration * s.layers * (2.0 * s.hidden * s.attention + 2.0 * spec.text.seqlen * s.attention)
    if training.flops:
        # The windows that weights are solved on go through what was learned once more.
        flops += training.flops + s.forward(calibration, spec.text.seqlen)
    return run.stage(
        "quantize",
        kept,
        max(embedding + s.embedding * FLOAT16, solved, noisy + 2 * s.layer * value if copies else 0),
        max(embedding, solved + run.window(spec.text)) + SEARCH_BYTES,
        JOINED * (s.stack // 2 + 2 * s.embedding * FLOAT16) + kept + noisy,
        flops,
        SEARCH_PASSES * float(s.stack) if searched else 0.0,
        "fewer calibration windows (quantization.text.windows)",
    )


def _solving(run: _Run, spec: QuantizeSpec) -> int:
    """Bytes of a layer whose weights become codes, and of what is held beside it."""
    s, value = run.sizes, run.value
    # Codes of what is solved already, half a byte each, beside the widest linear, or all experts still to come.
    unsolved = s.layer * value if s.active < s.layer else s.layer // 2 + s.wide * value
    if spec.needs_float_model:
        unsolved = s.layer * value + s.layer // 2  # The float model's layer lets go of its weights at the end.
    if not spec.needs_inputs:
        return max(s.layer * value, unsolved)
    solving = _hessians(s.widest, spec) + max(2, spec.rounder.copies) * s.wide * FLOAT32
    return max(unsolved + solving, s.layer * value + _hessians(s.hidden, spec))


def _evaluate(run: _Run, text: TextSpec) -> StagePlan:
    s, value, tokens = run.sizes, run.value, _tokens(text)
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


@dataclass(frozen=True)
class Training:
    """What clips that learn take: bytes while one layer trains, bytes of states between layers, FLOPs of all layers."""

    memory: int = 0
    states: int = 0
    flops: float = 0.0

    @classmethod
    def of(cls, s: Sizes, learning: ClipLearning | None, value: int) -> Training:
        """Of a model and what is to be learned; nothing for nothing."""
        if learning is None:
            return cls()
        batch, tokens = BATCH * learning.seqlen, learning.windows * learning.seqlen
        # A quantizer keeps what it read and how far it was from that; a weight is made of codes and scales.
        kept = 2 * batch * (KEPT_HIDDEN * s.hidden + KEPT_WIDE * s.widest) + 3 * s.layer
        return cls(
            kept * FLOAT32 + tokens * s.hidden * value,
            2 * tokens * s.hidden * value,
            learning.steps * 3 * s.forward(batch, learning.seqlen) + 2 * s.forward(tokens, learning.seqlen),
        )


def _hessians(width: int, quantize: QuantizeSpec) -> int:
    """Bytes of the Hessian and what is held beside it at most, of its size.

    GPTQ has its factor, and the float32 copy of a float64 one; GPTAQ three more; matching four in all.
    """
    if quantize.needs_float_model:
        matrices, copies = 5, 1
    else:
        matrices, copies = (4, 0) if quantize.match_outputs else (2, 1)
    return width**2 * (matrices * FLOAT64 + copies * FLOAT32 if width <= FLOAT64_WIDTH else matrices * FLOAT32)
