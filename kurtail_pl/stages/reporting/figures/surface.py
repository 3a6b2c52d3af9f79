"""Fig. 2: the magnitudes of tokens and channels as a surface, before and after rotation."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from kurtail_pl.stages.reporting.figures.style import (
    DPI,
    GREY,
    HADAMARD,
    PAGE_WIDTH,
    VANILLA,
    colours_of,
    title_of,
)

TOKENS, CHANNELS = 64, 72
"""Points of a surface: a figure of these takes 0.3 CPU seconds, of 512 x 576 it takes 7 and shows no more on a page."""


def patches(magnitude: Tensor) -> Tensor:
    """Tokens in the order of their largest magnitude, and of each patch the largest: no outlier is lost.

    Rows of a store have no order of their own; in this one the maxima make a sheet that can be seen through.

    Args:
        magnitude: ``[tokens, channels]``.

    Returns:
        At most ``[64, 72]``.
    """
    ordered = magnitude[magnitude.amax(1).argsort()]
    size = (min(TOKENS, ordered.shape[0]), min(CHANNELS, ordered.shape[1]))
    return F.adaptive_max_pool2d(ordered[None], size)[0]


def draw_surfaces(before: Tensor, after: Tensor, method: str, site: str) -> Figure:
    """Two surfaces on one scale, each under the sheet of its tokens' maxima.

    Args:
        before: magnitudes ``[tokens, channels]``.
        after: of the same tokens, rotated.
        method: that learned the rotation.
        site: name of the site.
    """
    figure = Figure(figsize=(PAGE_WIDTH, 3.3), dpi=DPI)
    colours = colours_of((VANILLA, HADAMARD, method))  # As in the figures that show all three.
    limit = 1.05 * max(before.max().item(), after.max().item())
    for place, (name, magnitude) in enumerate(((VANILLA, before), (method, after)), start=1):
        axes: Any = figure.add_subplot(1, 2, place, projection="3d")
        _draw(axes, magnitude, colours[name])
        axes.set_zlim(0, limit)
        axes.set_title(name, y=0.94)
    figure.suptitle(f"{title_of(site)}; grey: largest magnitude of each token", fontsize="medium")
    # The other layouts do not see the labels of three axes.
    figure.subplots_adjust(left=0.0, right=0.95, bottom=0.04, top=0.95, wspace=0.1)
    return figure


def _draw(axes: Any, magnitude: Tensor, colour: str) -> None:
    pooled = patches(magnitude)
    tokens = torch.linspace(0, magnitude.shape[0] - 1, pooled.shape[0])
    channels = torch.linspace(0, magnitude.shape[1] - 1, pooled.shape[1])
    x, y = (grid.numpy() for grid in torch.meshgrid(channels, tokens, indexing="xy"))
    sheet = pooled.amax(1, keepdim=True).expand_as(pooled)
    whole = {"rstride": 1, "cstride": 1, "linewidth": 0}
    axes.plot_surface(x, y, pooled.numpy(), color=colour, **whole)
    axes.plot_surface(x, y, sheet.numpy(), color=GREY, alpha=0.3, **whole)
    axes.set_xlabel("channel", labelpad=-2)
    axes.set_ylabel("token (sorted)", labelpad=-2)
    axes.set_zlabel("magnitude / rms", labelpad=-4)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize="small", pad=-1)
    axes.set_facecolor("none")
    axes.view_init(elev=20, azim=-50)
    axes.set_box_aspect(None, zoom=0.93)
