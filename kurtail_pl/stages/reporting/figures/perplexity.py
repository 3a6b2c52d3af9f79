"""Perplexity of every line of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure

from kurtail_pl.stages.reporting.figures.style import colours_of, new_figure


def draw_perplexity(values: Mapping[tuple[str, str, str], Sequence[float]], title: str) -> Figure:
    """Bars of perplexity (log scale), one for each line of a comparison, with the spread over seeds.

    Args:
        values: perplexities of every seed by method, rounding and bits, in the order of the table.
        title: of the picture.
    """
    figure = new_figure(0.9 + 0.3 * len(values))
    axes, colours = figure.subplots(), colours_of(method for method, *_ in values)
    for place, ((method, *_), numbers) in enumerate(values.items()):
        centre = mean(numbers)
        spread = [[centre - min(numbers)], [max(numbers) - centre]] if len(numbers) > 1 else None
        axes.barh(place, centre, xerr=spread, capsize=3, color=colours[method])
        axes.annotate(f"{centre:.2f}", (max(numbers), place), (6, 0), textcoords="offset points", va="center", size=8)
    names = [
        " ".join(dict.fromkeys((method, bits, *([] if weights == "-" else [weights]))))
        for method, weights, bits in values
    ]
    axes.set_yticks(range(len(values)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    # Room for the numbers beside the bars.
    axes.set_xlim(min(min(v) for v in values.values()) * 0.7, max(max(v) for v in values.values()) * 2)
    axes.set_xlabel("perplexity (lower is better)")
    axes.set_title(title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
