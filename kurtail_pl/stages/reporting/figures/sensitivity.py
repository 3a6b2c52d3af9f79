"""Fig. 1: how much a wrong quantization step costs."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.maths.sensitivity import Sensitivity
from kurtail_pl.stages.reporting.figures.style import (
    GREY,
    colours_of,
    legend_above,
    new_figure,
    title_of,
)

RANGE = 1e4
"""Of the highest sensitivity to the lowest that is shown: at the best step it is 0."""


def draw_sensitivity(curves: Mapping[str, Sensitivity], fractions: Tensor, site: str, bits: int) -> Figure:
    """Growth of the error, logarithmic, against the fraction of the best step.

    Args:
        curves: of each method, their growth ``[k]``.
        fractions: of the best step, ``[k]``.
        site: name of the site.
        bits: of the quantizer.
    """
    figure = new_figure(3.0)
    axes, colours = figure.add_subplot(), colours_of(curves)
    for method, curve in curves.items():
        axes.plot(fractions.tolist(), curve.growth.tolist(), color=colours[method], label=method)
    axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log", nonpositive="mask")
    highest = max(curve.growth.max().item() for curve in curves.values())
    axes.set_ylim(highest / RANGE, 2 * highest)
    axes.set_xlabel(r"step, as a fraction of the best one, $\alpha$")
    axes.set_ylabel("sensitivity $\\Gamma$\n(squares of the token's rms)")
    axes.set_title(f"{title_of(site)}, {bits} bits")
    legend_above(figure, axes)
    return figure
