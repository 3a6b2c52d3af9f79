"""The picture of a comparison, and how pictures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from kurtail_pl.stages.results import LABELS

COLOURS = {
    "float": "#555555", "none": "#999999", "rtn": "#999999", "gptq": "#999999", "quarot": "#0072b2",
    "spinquant": "#e69f00", "kurtail": "#009e73",
}  # fmt: skip
"""One colour for each method in all pictures; Okabe and Ito's, told apart by all kinds of sight."""


def perplexity_chart(values: Mapping[tuple[str, str, str], Sequence[float]], title: str) -> Figure:
    """Bars of perplexity (log scale), one for each line of a comparison, with the spread over seeds.

    Args:
        values: perplexities of every seed by method, rounding and bits, in the order of the table.
        title: of the picture.
    """
    figure = Figure(figsize=(6.5, 0.8 + 0.3 * len(values)), layout="constrained")
    axes = figure.subplots()
    for place, ((method, *_), numbers) in enumerate(values.items()):
        centre = mean(numbers)
        spread = [[centre - min(numbers)], [max(numbers) - centre]] if len(numbers) > 1 else None
        axes.barh(place, centre, xerr=spread, capsize=3, color=COLOURS.get(method, "#000000"))
        axes.annotate(f"{centre:.2f}", (max(numbers), place), (6, 0), textcoords="offset points", va="center", size=8)
    names = [
        " ".join(dict.fromkeys((LABELS.get(method, method), bits, *([] if weights == "-" else [weights]))))
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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG through a temporary name."""
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png", dpi=200)
    temporary.replace(path)
