"""What all figures share: page width, and one colour for each method."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

VANILLA, HADAMARD = "vanilla", "hadamard"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart."""
GREY = "#666666"

PAGE_WIDTH = 6.5
"""Inches between the margins of a page."""
DPI = 200

NORMALISED = "units of the token's root mean square"
"""The unit of normed activations."""

BLOCKS = {"attn_in": "MHSA", "ffn_in": "FFN"}


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    """A colour for each method, in the order in which they first appear."""
    return dict(zip(dict.fromkeys(methods), cycle(COLOURS), strict=False))


def title_of(site: str) -> str:
    """``layer007.attn_in`` -> ``input of MHSA, layer 7``."""
    layer, block = site.split(".")
    return f"input of {BLOCKS[block]}, layer {int(layer.removeprefix('layer'))}"


def new_figure(height: float) -> Figure:
    """An empty figure as wide as a page, ``height`` inches high, whose parts make room for each other."""
    return Figure(figsize=(PAGE_WIDTH, height), dpi=DPI, layout="constrained")


def legend_above(figure: Figure, axes: Axes) -> None:
    """One line of the axes' methods above all axes, where no data can be under it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
