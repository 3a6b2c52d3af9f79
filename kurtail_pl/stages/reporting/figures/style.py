"""What all figures share: page width, and one colour and name for each method."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kurtail_pl.stages.evaluation.results import LABELS

VANILLA, HADAMARD = "vanilla", "hadamard"
NAMES = {**LABELS, VANILLA: "vanilla", HADAMARD: "Hadamard (QuaRot)"}
COLOURS = {
    VANILLA: "#D55E00", "none": "#D55E00", "rtn": "#D55E00", "gptq": "#D55E00", "higgs": "#D55E00",
    HADAMARD: "#0072B2", "quarot": "#0072B2", "spinquant": "#CC79A7", "kurtail": "#009E73", "float": "#666666",
}  # fmt: skip
"""Okabe and Ito's, which the colour-blind tell apart."""
OTHER_COLOUR, GREY = "#E69F00", "#666666"

PAGE_WIDTH = 6.5
"""Inches between the margins of a page."""
DPI = 200

NORMALISED = "units of the token's root mean square"
"""The unit of normed activations."""

BLOCKS = {"attn_in": "MHSA", "ffn_in": "FFN"}


def name_of(method: str) -> str:
    """A method as legends and tables print it."""
    return NAMES.get(method, method)


def colour_of(method: str) -> str:
    """A method's colour, the same in every figure."""
    return COLOURS.get(method, OTHER_COLOUR)


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
