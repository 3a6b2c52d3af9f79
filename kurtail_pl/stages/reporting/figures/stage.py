"""Figures: everything that the paper draws, from a store's held-out rows, vanilla beside Hadamard beside learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.kurtosis import kurtosis, rms_norm
from kurtail_pl.maths.objectives import rounding_error
from kurtail_pl.maths.orthogonal import orthogonality_error
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.maths.sensitivity import sensitivity
from kurtail_pl.progress import track
from kurtail_pl.stages.reporting.figures.histogram import densities, draw_histogram
from kurtail_pl.stages.reporting.figures.kurtosis import draw_kurtosis_by_layer
from kurtail_pl.stages.reporting.figures.reduction import Reductions
from kurtail_pl.stages.reporting.figures.sensitivity import draw_sensitivity
from kurtail_pl.stages.reporting.figures.style import HADAMARD, VANILLA
from kurtail_pl.stages.reporting.figures.surface import draw_surfaces, patches
from kurtail_pl.storage.activations import ActivationStore, block_sites
from kurtail_pl.storage.files import new_folder, write_json, write_text
from kurtail_pl.storage.keys import require_learned_on
from kurtail_pl.surgery.rotations import Rotations

PAPER_LAYERS = (1, 15)
"""Those of Fig. 1."""
BITS = 4
ROUNDED = Quantizer(BITS)
"""Whose error is measured at each block input."""
FRACTIONS = torch.linspace(0.5, 2.0, 151, dtype=torch.float64)
SENSITIVITY_VALUES, HISTOGRAM_VALUES, SURFACE_TOKENS = 1 << 18, 1 << 16, 512
"""Enough for smooth curves; whole rows, the first ones of the held-out rows, which are in random order."""
ORTHOGONAL = 1e-5
"""Largest entry of ``|R1^T R1 - I|``; learned ones are re-orthogonalised in float64 when they are written."""
SUMMARY, TABLE = "figures.json", "max_reduction.md"


@dataclass(frozen=True)
class Pages:
    """What was drawn, by TensorBoard's tags, and all of its numbers."""

    figures: dict[str, Figure] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def figures(
    store: ActivationStore,
    rotations: Rotations,
    hadamard: Rotations,
    rms_norm_eps: float,
    folder: Path,
    rows: int,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Pages:
    """Draw every figure and write `*.png`, `max_reduction.md` and `figures.json`, which holds all numbers drawn.

    Args:
        store: activations of the vanilla model.
        rotations: the learned ones; their origin names the method.
        hadamard: random ones of the same seed, the baseline.
        rms_norm_eps: of the model's norms.
        folder: where they go.
        rows: the store's last ones, which were kept out of training.
        layers: whose sensitivity, surface and histogram are drawn; by default the paper's 1 and 15, or the last one.
        overwrite: replace the folder if it exists.

    Raises:
        ArtefactError: when the folder exists and may not be replaced.
        ConfigError: when the rotations are not this model's, or rows or layers are asked for that there are not.
        StoreMismatch: when a file of the store is missing or damaged.
    """
    require_learned_on(rotations, store.origin.model_sha256, store.folder)
    store.require_intact()
    method = rotations.origin.get("method", "learned")
    bases = {VANILLA: Rotations(), HADAMARD: _fitting(store, hadamard), method: _fitting(store, rotations)}
    chosen = chosen_layers(store.shape.layers, layers)
    total = store.origin.rows
    if not 0 < rows <= total:
        raise ConfigError(f"rows is {rows}; the store {store.folder} has {total}: ask for 1 to {total}")
    pages, reductions = Pages(), Reductions(method)
    values: dict[str, list[Tensor]] = {name: [] for name in bases}
    errors: dict[str, list[Tensor]] = {name: [] for name in bases}
    with new_folder(folder, overwrite) as partial:
        for place, site in enumerate(track(block_sites(store.shape.layers), "figures")):
            normed = rms_norm(store.read(site, total - rows, total), rms_norm_eps)
            views = {name: basis.turn_input(normed, place) for name, basis in bases.items()}
            for name, view in views.items():
                values[name].append(kurtosis(view.double().flatten()))
                errors[name].append(rounding_error(view, Tensor.mean, ROUNDED))
            reductions.update(site, views)
            if place // 2 in chosen:
                _site_pages(pages, site, views, method)
        by_layer = {name: torch.stack(found).view(-1, 2) for name, found in values.items()}
        pages.figures["kurtosis_by_layer"] = draw_kurtosis_by_layer(by_layer)
        pages.tables["max_reduction"] = reductions.markdown()
        numbers = {name: _plain(found) for name, found in by_layer.items()}
        rounded = {name: _plain(torch.stack(found).view(-1, 2)) for name, found in errors.items()}
        pages.summary.update(model=store.origin.model, method=method, rows=rows)
        pages.summary.update(kurtosis=numbers, rounding_error=rounded, max_reduction=reductions.to_dict())
        for tag, figure in pages.figures.items():
            figure.savefig(partial / file_of(tag))
        write_text(partial / TABLE, pages.tables["max_reduction"])
        write_json(partial / SUMMARY, pages.summary)
    return pages


def file_of(tag: str) -> str:
    """Name of a figure's file in the folder."""
    return f"{tag.replace('/', '-')}.png"


def _fitting(store: ActivationStore, rotations: Rotations) -> Rotations:
    """Rotations whose R1 is one and fits the store."""
    residual, inputs, hidden = rotations.residual, rotations.block_input, store.shape.hidden_size
    matrices = [each for each in (residual, *((inputs.left, inputs.right) if inputs else ())) if each is not None]
    width = inputs.size if inputs else None if residual is None else len(residual)
    if width != hidden:
        found = "there is none" if width is None else f"it is {width} wide"
        raise ConfigError(f"the store {store.folder} needs a rotation R1 {hidden} wide and {found}; name its own file")
    # Files of rotations have no card beside them; bytes that are lost leave no rotation.
    if not all(orthogonality_error(matrix).max() < ORTHOGONAL for matrix in matrices):
        raise ConfigError("the rotation R1 is not orthogonal: its file is damaged; copy it again")
    return rotations


def chosen_layers(layers: int, asked: Sequence[int] | None) -> set[int]:
    """The layers asked for, by default the paper's or the last one; raises ConfigError when a model has no such one."""
    if asked is None:
        return {min(layer, layers - 1) for layer in PAPER_LAYERS}
    for layer in asked:
        if not 0 <= layer < layers:
            raise ConfigError(f"layers has {layer}; the model's are 0 to {layers - 1}")
    return set(asked)


def _site_pages(pages: Pages, site: str, views: dict[str, Tensor], method: str) -> None:
    """Surface, sensitivity and histogram of one site, with ``[rows, hidden]`` of each method."""
    pooled = {name: views[name][:SURFACE_TOKENS].abs() for name in (VANILLA, method)}
    pages.figures[f"surface/{site}"] = draw_surfaces(pooled[VANILLA], pooled[method], method, site)
    curves = {name: sensitivity(_first(view, SENSITIVITY_VALUES), FRACTIONS, BITS) for name, view in views.items()}
    pages.figures[f"sensitivity/{site}"] = draw_sensitivity(curves, FRACTIONS, site, BITS)
    edges, density = densities(views)
    pages.figures[f"histogram/{site}"] = draw_histogram(edges, density, site)
    for name, view in views.items():
        pages.histograms[f"activation/{site}/{name}"] = _first(view, HISTOGRAM_VALUES)
    pages.summary[site] = {
        "surface": {name: _plain(patches(magnitude)) for name, magnitude in pooled.items()},
        "sensitivity": {
            "bits": BITS,
            "fractions": _plain(FRACTIONS),
            **{
                name: {"step": c.step.item(), "error": c.error.item(), "growth": _plain(c.growth)}
                for name, c in curves.items()
            },
        },
        "histogram": {"edges": _plain(edges), **{name: _plain(heights) for name, heights in density.items()}},
    }


def _first(view: Tensor, values: int) -> Tensor:
    """The first rows, about as many as hold that number of values; at least one."""
    return view[: max(1, values // view.shape[1])].flatten()


def _plain(tensor: Tensor) -> Any:
    """Nested lists of numbers with five digits, which is more than a figure can show."""
    if tensor.ndim:
        return [_plain(part) for part in tensor]
    return float(f"{tensor.item():.5g}")
