"""What learning rotations takes, by what they are learned from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kurtail_pl.methods.cost import FLOAT32, KEPT_HIDDEN, KEPT_WIDE
from kurtail_pl.stages.planning.run import Run, StagePlan

CAYLEY_PRODUCTS = 9
"""One Cayley step has so many products of square matrices: direction, its product with X, five passes, the polish."""


class Learning(ABC):
    """How rotations are learned.

    Attributes:
        seqlen: tokens of the windows that it learns from; None for rows of a store.
    """

    seqlen: int | None

    @abstractmethod
    def plan(self, run: Run) -> StagePlan:
        """What it takes."""


@dataclass(frozen=True)
class ProxyLearning(Learning):
    """Rotations learned from cached activations: iterations, and rows of each site in a batch."""

    steps: int
    batch_rows: int
    seqlen = None

    def plan(self, run: Run) -> StagePlan:
        """Batches and square matrices."""
        s, program, on_cuda = run.sizes, run.program, run.compute.on_cuda
        # In bfloat16 twice, with the one that is read meanwhile; what is kept of it is float32.
        batch = 2 * s.layers * self.batch_rows * s.hidden * FLOAT32
        products = self.steps * 3.0 * 4 * s.layers * self.batch_rows * s.hidden**2
        taken = 3 * batch + _square(run)
        memory, device = (program + batch, taken) if on_cuda else (program + taken, None)
        knob = "smaller batches (data.init_args.batch_rows)"
        return StagePlan("learn", memory, _disk(run), products + _cayley(run, self.steps), 0.0, knob, device)


@dataclass(frozen=True)
class WholeModelLearning(Learning):
    """Rotations learned through the whole model: iterations, windows in a batch and their tokens."""

    steps: int
    batch_windows: int
    seqlen: int

    def plan(self, run: Run) -> StagePlan:
        """The whole model, and what its backward pass needs."""
        s, on_cuda = run.sizes, run.compute.on_cuda
        tokens = self.batch_windows * self.seqlen
        # Weights as they are and as rotated, two steps of them; and what the backward pass needs of every layer.
        weights = 3 * s.stack + 2 * s.embedding
        kept = s.layers * tokens * (KEPT_HIDDEN * s.hidden + KEPT_WIDE * s.widest) + 4 * tokens * run.vocabulary
        turned = 2.0 * s.stack * s.hidden
        forward = s.forward(tokens, self.seqlen) + 2.0 * tokens * s.embedding + turned
        taken = (weights + kept) * FLOAT32 + _square(run)
        # The whole model is read on the CPU first.
        memory = run.program + (weights * FLOAT32 if on_cuda else taken)
        flops = self.steps * 3 * forward + _cayley(run, self.steps)
        knob = "smaller batches or shorter windows (data.init_args); this method needs the whole model"
        return StagePlan("learn", memory, _disk(run), flops, 0.0, knob, taken if on_cuda else None)


def _square(run: Run) -> int:
    """Bytes of R1, its gradient, momentum and what a step makes of them."""
    return 12 * run.sizes.hidden**2 * FLOAT32


def _disk(run: Run) -> int:
    return 3 * run.sizes.hidden**2 * FLOAT32


def _cayley(run: Run, steps: int) -> float:
    return steps * CAYLEY_PRODUCTS * 2.0 * run.sizes.hidden**3
