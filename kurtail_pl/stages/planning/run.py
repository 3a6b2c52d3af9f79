"""What a stage takes on one model and machine."""

from __future__ import annotations

from dataclasses import dataclass

from kurtail_pl.methods.cost import FLOAT32, Sizes
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.streaming.compute import Compute

WHOLE_TEXT = 350_000
"""Tokens of a text that is taken whole, about: the test split of WikiText-2 has so many, and a plan reads no text."""


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


@dataclass(frozen=True)
class Run:
    """A model's sizes, and what runs it: the program's bytes, device and type."""

    sizes: Sizes
    vocabulary: int
    program: int
    compute: Compute

    def states(self, text: TextSpec) -> int:
        """Bytes of a text's hidden states, before a layer and after it."""
        return 2 * tokens_of(text) * self.sizes.hidden * self.sizes.value

    def window(self, text: TextSpec) -> int:
        """Bytes that one window takes inside a layer."""
        return 6 * text.seqlen * self.sizes.widest * self.sizes.value

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


def tokens_of(text: TextSpec) -> int:
    """How many a text has."""
    return WHOLE_TEXT if text.windows is None else text.windows * text.seqlen
