"""Draws the gate's figure of docs/concepts.md from SmolLM2-135M: `python docs/gate_figure.py` writes docs/gate.png.

The layers are fused twice: with R1 as it is, and with R1 in float32, which is orthogonal to seven digits only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.stages.fusion.passes import transforms_of, turned
from kurtail_pl.stages.reporting.figures.style import COLOURS, GREY, new_figure
from kurtail_pl.storage.sources import open_model
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.gate import FLOAT64_TOLERANCE, LargestChange, use_exact_layer
from kurtail_pl.surgery.rotations import random_rotations

DOCS = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
TOKENS = 64


def changes(rounded: bool) -> Iterator[tuple[int, float]]:
    """For each fold the layer, and how much the layer's output changed, relative to the largest number."""
    checkpoint = open_model(MODEL)
    walker = Walker(checkpoint, dtype=torch.float64, device=torch.device("cpu"))
    walker.model.set_attn_implementation(ATTENTION)
    rotations = random_rotations(checkpoint.config, 0)
    residual = rotations.residual
    assert residual is not None
    used = residual.float().double() if rounded else residual
    transforms = transforms_of(walker, replace(rotations, residual=used), None)
    tokens = torch.randint(checkpoint.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    hidden: Tensor = walker.embedding(torch.float32)(tokens).double()
    for index, layer in walker.layers("gate"):
        use_exact_layer(layer, walker.architecture, checkpoint.config.rms_norm_eps)
        before, after = hidden, walker.advance(layer, hidden)
        hidden = after
        for transform in transforms:
            if not transform.fold(layer, index):
                continue
            if transform.turns:
                before, after = turned(before, used), turned(after, used)
            change = LargestChange()
            change.update(after, walker.advance(layer, before))
            yield index, change.relative


def draw(found: dict[str, list[tuple[int, float]]]) -> Figure:
    """The largest change of each layer, and the line that none may cross."""
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    axes.axhline(FLOAT64_TOLERANCE, color=GREY, linewidth=0.8)
    axes.annotate("the gate", (14, FLOAT64_TOLERANCE), (0, 3), textcoords="offset points", fontsize=8, color=GREY)
    for colour, (name, points) in zip((2, 0), found.items(), strict=True):
        largest: dict[int, float] = {}
        for index, change in points:
            largest[index] = max(change, largest.get(index, 0))
        axes.plot(list(largest), list(largest.values()), ".-", color=COLOURS[colour], linewidth=0.8, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest change of the layer's\noutput after a fold, relative")
    axes.legend(frameon=False, loc="center right", fontsize=8)
    return figure


def main() -> None:
    """Fuse both and draw."""
    found = {
        "R1 in float64": list(changes(rounded=False)),
        "R1 rounded to float32: refused": list(changes(rounded=True)),
    }
    draw(found).savefig(DOCS / "gate.png")


if __name__ == "__main__":
    main()
