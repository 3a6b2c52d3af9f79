"""Which linears and which inputs lose most by being rounded."""

from __future__ import annotations

import re
from collections import defaultdict

from kurtail_pl.stages.reporting.figures.style import BLOCKS
from kurtail_pl.stages.reporting.page.charts import heat
from kurtail_pl.stages.reporting.page.model import Model
from kurtail_pl.stages.reporting.page.section import Picture, Section, Table

SHOWN = 300
"""Lines of a table, the worst ones; a model of experts has tens of thousands of linears."""
LAYER = re.compile(r"^.*?layers\.(\d+)\.")
Errors = dict[str, dict[str, float]]


def errors(model: Model, drawn: Model) -> Section | None:
    """Relative square errors of linears and of block inputs, the worst first.

    Args:
        model: whose linears are shown.
        drawn: whose block inputs are.
    """
    found: Errors = model.card.get("errors", {})
    tables = [table for table in (_linears(found), _sites(drawn)) if table is not None]
    if not tables:
        return None
    about = (
        f"Of the model {model.folder.name}: the square of what rounding changes, over the square of what was there. "
        "0.01 is 1 %. The error of an output is what a linear's rounded weight does to it on the calibration text, in "
        "32 evenly spaced channels. It stands where the rounding used that text; the error of a weight needs none."
    )
    return Section("Error by linear and site", about, [_map(found)] if found else [], tables)


def _measure(found: Errors) -> str:
    """What linears are ordered by: the error of the output, that of the weight where none has one."""
    return "output" if any("output" in each for each in found.values()) else "weight"


def _map(found: Errors) -> Picture:
    """Linears of a kind in a line, over the layers; of experts of a kind the worst."""
    measure, values = _measure(found), defaultdict[str, dict[int, float]](dict)
    for name, each in found.items():
        if match := LAYER.match(name):
            kind, layer = re.sub(r"\.\d+\.", ".*.", name[match.end() :]), int(match[1])
            values[kind][layer] = max(values[kind].get(layer, 0.0), each.get(measure, 0.0))
    return heat(f"Error of each linear's {measure}", values, "layer")


def _linears(found: Errors) -> Table | None:
    if not found:
        return None
    measure = _measure(found)
    worst = sorted(found, key=lambda name: -found[name].get(measure, 0.0))
    rows = [[name, *(_shown(found[name].get(of)) for of in ("output", "weight"))] for name in worst[:SHOWN]]
    note = f"The worst {SHOWN} of {len(found)}; kurtail.json has all." if len(found) > SHOWN else ""
    return Table(["linear", "error of output", "error of weight"], rows, note)


def _sites(model: Model) -> Table | None:
    """Of block inputs in 4 bits, before and after."""
    drawn = model.figures.rounding_error
    layers = min(map(len, drawn.values()), default=0)
    if not layers:
        return None
    lines = [
        (f"input of {title}, layer {layer}", [rows[layer][block] for rows in drawn.values()])
        for layer in range(layers)
        for block, title in enumerate(BLOCKS.values())
    ]
    lines.sort(key=lambda line: -line[1][-1])
    rows = [[name, *map(_shown, values)] for name, values in lines[:SHOWN]]
    return Table(["site", *drawn], rows, f"Block inputs of {model.folder.name} in 4 bits, a scale for each token.")


def _shown(value: float | None) -> str:
    """Five places, so that the digits of a column stand one below the other."""
    return "-" if value is None else f"{value:.5f}"
