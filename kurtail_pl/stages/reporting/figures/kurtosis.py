"""Kurtosis of every block input, method beside method."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.maths.kurtosis import UNIFORM_KURTOSIS
from kurtail_pl.stages.reporting.figures.style import (
    BLOCKS,
    GREY,
    colours_of,
    legend_above,
    new_figure,
)

NORMAL_KURTOSIS = 3.0
BAR_GROUP = 0.84
"""Share of a layer's place that its bars take."""


def draw_kurtosis_by_layer(values: Mapping[str, Tensor]) -> Figure:
    """Bars of each layer, one panel for each block, logarithmic, from 1, below which no kurtosis can be.

    Args:
        values: of each method, ``[layers, 2]``: MHSA and FFN.
    """
    figure = new_figure(4.6)
    panels = figure.subplots(len(BLOCKS), 1, sharex=True, sharey=True)
    width, colours = BAR_GROUP / len(values), colours_of(values)
    for block, (axes, title) in enumerate(zip(panels, BLOCKS.values(), strict=True)):
        for place, (method, kurtosis) in enumerate(values.items()):
            left = [layer + (place - (len(values) - 1) / 2) * width for layer in range(len(kurtosis))]
            heights = (kurtosis[:, block] - 1).tolist()
            axes.bar(left, heights, width, bottom=1, color=colours[method], label=method)
        for value, name in ((UNIFORM_KURTOSIS, "uniform"), (NORMAL_KURTOSIS, "normal")):
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle="--")
            place_of = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": "small"}
            axes.annotate(f" {name} {value:g}", (1, value), **place_of)
        axes.set_yscale("log")
        axes.set_ylabel(f"kurtosis, input of {title}")
        axes.set_xlim(-0.6, len(kurtosis) - 0.4)
    panels[0].set_ylim(bottom=1)
    panels[-1].set_xlabel("layer")
    legend_above(figure, panels[0])
    return figure
