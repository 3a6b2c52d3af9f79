"""What a measured model's folder holds that a page shows; all but the results may be absent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, with_config

from kurtail_pl.errors import ArtefactError
from kurtail_pl.stages.evaluation.results import read_results
from kurtail_pl.storage.card import is_ours, read_card
from kurtail_pl.storage.files import write_json
from kurtail_pl.storage.reading import Unreadable, read_utf8
from kurtail_pl.storage.records import OTHERS_TOO, Number, fields_of, read_object

CURVES, FIGURES, RECIPE = "training.json", Path("figures") / "figures.json", "recipe.yaml"
AGAIN = "remove it, and run kurtail report again"
SITE = re.compile(r"layer(\d+)\.(attn_in|ffn_in)")

Rows = list[list[Number]]


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Curves:
    """`training.json`: the steps at which the module was looked at, and what it logged there."""

    steps: list[Annotated[int, Field(ge=0, lt=1 << 50)]]
    values: dict[str, list[Number]]


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Surface:
    surface: dict[str, Rows]


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class Figures:
    """What is read of `figures.json`.

    Args:
        kurtosis: by method, of each layer's two block inputs, ``[layers, 2]``.
        rounding_error: by method, the same of their 4-bit error.
        surfaces: by site and method, magnitudes ``[tokens, channels]``.
    """

    kurtosis: dict[str, Rows] = field(default_factory=dict)
    rounding_error: dict[str, Rows] = field(default_factory=dict)
    surfaces: dict[str, dict[str, Rows]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Model:
    """A measured model.

    Args:
        name: in legends and tables.
        folder: its own.
        results: what was measured.
        card: `kurtail.json`; empty for a plain model.
        curves: of the training: by name, pairs of step and value.
        figures: what was drawn.
        recipe: as it was run; empty where the verbs made it.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    card: dict[str, Any]
    curves: dict[str, list[tuple[float, float]]]
    figures: Figures
    recipe: str

    @property
    def sites(self) -> Rows:
        """Kurtosis as its own results have it, ``[layers, 2]``; empty where they have it otherwise."""
        found = {SITE.fullmatch(site): value for site, value in self.results["kurtosis"]["sites"].items()}
        values = {(int(match[1]), match[2]): value for match, value in found.items() if match}
        layers = [[values.get((layer, block)) for block in ("attn_in", "ffn_in")] for layer in range(len(values) // 2)]
        return [[first, second] for first, second in layers if first is not None and second is not None]


def read_model(folder: Path, name: str | None = None) -> Model:
    """A measured model's folder.

    Args:
        folder: with results.
        name: on the page; the method if not given.

    Raises:
        ArtefactError: when there are no results, or a file is damaged.
    """
    results = read_results(folder)
    return Model(
        name=results["method"] if name is None else name,
        folder=folder,
        results=results,
        card=read_card(folder) if is_ours(folder) else {},
        curves=_curves(folder / CURVES),
        figures=_figures(folder / FIGURES),
        recipe=_text(folder / RECIPE),
    )


def write_curves(folder: Path, steps: list[int], values: Mapping[str, list[float]]) -> None:
    """Keep the curves of a training in the folder of what was made by it."""
    write_json(folder / CURVES, {"steps": steps, "values": values})


def _figures(path: Path) -> Figures:
    drawn = _object(path)
    sites = {
        site: fields_of(drawn[site], _Surface, path, ArtefactError, AGAIN) for site in drawn if SITE.fullmatch(site)
    }
    surfaces = {site: found.surface for site, found in sites.items()}
    read = fields_of({**drawn, "surfaces": surfaces}, Figures, path, ArtefactError, AGAIN)
    layered = (*read.kurtosis.values(), *read.rounding_error.values())
    if any(len(layer) != 2 for layers in layered for layer in layers):
        raise ArtefactError(f"{path} has not two block inputs in each layer; {AGAIN}")
    return read


def _curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    if not path.is_file():
        return {}
    found = fields_of(_object(path), _Curves, path, ArtefactError, AGAIN)
    if any(len(values) != len(found.steps) for values in found.values.values()):
        raise ArtefactError(f"{path} has not as many values as steps; {AGAIN}")
    return {name: list(zip(found.steps, values, strict=True)) for name, values in found.values.items()}


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, ArtefactError, AGAIN) if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return read_utf8(path) if path.is_file() else ""
    except Unreadable as error:
        raise ArtefactError(f"{path} {error}; {AGAIN}") from error
