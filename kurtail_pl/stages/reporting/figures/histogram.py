"""Histograms of normed activations, method over method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.stages.reporting.figures.style import (
    NORMALISED,
    colours_of,
    legend_above,
    new_figure,
    title_of,
)

BINS = 121
"""Odd: one is centred on zero."""


def densities(values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Common edges ``[bins + 1]``, symmetric about zero, and the density of each method, ``[bins]``.

    Args:
        values: of each method, ``[n]``.
    """
    limit = max(tensor.abs().max().item() for tensor in values.values())
    edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64)
    return edges, {
        method: torch.histogram(tensor.double().flatten(), edges, density=True).hist
        for method, tensor in values.items()
    }


def draw_histogram(edges: Tensor, density: Mapping[str, Tensor], site: str) -> Figure:
    """Densities on common bins, logarithmic, so that the tails can be seen.

    Args:
        edges: of the bins, ``[bins + 1]``.
        density: of each method, ``[bins]``.
        site: name of the site.
    """
    figure = new_figure(3.0)
    axes, colours = figure.add_subplot(), colours_of(density)
    for method, heights in density.items():
        axes.stairs(heights.tolist(), edges.tolist(), color=colours[method], label=method)
    axes.set_yscale("log")
    axes.set_xlabel(f"activation ({NORMALISED})")
    axes.set_ylabel("density")
    axes.set_title(title_of(site))
    legend_above(figure, axes)
    return figure
