"""The comparison of several models in one table: Markdown, JSON, a picture and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, model_name, read_results
from kurtail_pl.stages.reporting.figures.perplexity import draw_perplexity
from kurtail_pl.stages.reporting.lines import Line, Row, gap_closed, lines_of, note_of, recovery, table_of
from kurtail_pl.stages.reporting.page import Table, page_of, read_model, write_page
from kurtail_pl.stages.reporting.page.charts import bars
from kurtail_pl.stages.reporting.page.section import Section
from kurtail_pl.stages.reporting.serving import Serving
from kurtail_pl.stages.tables import markdown
from kurtail_pl.storage.card import CARD, is_ours
from kurtail_pl.storage.files import sha256_of, whole_file, write_json, write_text

TABLE, DATA, CHART = "compare.md", "compare.json", "compare.png"
QUAROT = "quarot"


def write_comparison(
    rows: Sequence[Row],
    folder: Path,
    look: Callable[[Path], Serving] | None = None,
    refused: Mapping[str, str] | None = None,
) -> str:
    """Write `compare.md`, `compare.json`, `compare.png` and `report.html`; returns the Markdown.

    Args:
        rows: measured folders, all of one model on one text; the first is the float model.
        folder: where they go.
        look: how what an artefact takes where it is used is found; without it the table does not say so.
        refused: systems that cannot be made of this model, and why.
    """
    lines, refused = lines_of(rows, look), refused or {}
    reference = next(line for line in lines if line.method == FLOAT_METHOD)
    peers = {(line.bits, line.weights): line for line in lines if line.name == QUAROT}
    scored = all(line.of("zero_shot") for line in lines)
    derived = [
        (recovery(line, reference, scored), gap_closed(line, peers.get((line.bits, line.weights)), reference))
        for line in lines
    ]
    results = read_results(rows[0].folder)
    title, table = model_name(results["model"]), table_of(lines, derived, note_of(results, lines, scored))
    missing = "".join(f"- {name}: {reason}\n" for name, reason in refused.items())
    text = f"{markdown(table.columns, table.rows)}\n\n{table.note}\n" + (f"\nRefused:\n\n{missing}" if missing else "")
    write_text(folder / TABLE, f"# {title}\n\n{text}")
    write_json(folder / DATA, _data(rows, lines, derived, results) | {"refused": refused})
    chart = {(line.name, line.weights, line.bits): line.of("perplexity") for line in lines}
    with whole_file(folder / CHART) as temporary:
        draw_perplexity(chart, title).savefig(temporary, format="png")
    _write_page(lines, [table, *_refusals(refused)], title, folder)
    return text


def _refusals(refused: Mapping[str, str]) -> list[Table]:
    return [Table(("refused", "why"), list(refused.items()))] if refused else []


def _write_page(lines: list[Line], tables: list[Table], title: str, folder: Path) -> None:
    """The comparison as a page; of a line its first seed is shown, and the best line's folder in full."""
    models = [read_model(line.folders[0], line.title) for line in lines]
    ours = [model for model in models if model.card] or models
    chief = min(ours, key=lambda model: model.results["evaluation"]["perplexity"])
    names = list(dict.fromkeys(line.name for line in lines))
    colours = {line.title: names.index(line.name) for line in lines}
    chart = bars("Perplexity", {line.title: line.of("perplexity") for line in lines}, colours, "lower is better")
    several = "Below this table, of several seeds the first is shown." if len(lines[-1].seeds) > 1 else ""
    first = Section("Methods", several, [chart], tables)
    write_page(folder, page_of(title, models, chief, first))


def _data(
    rows: Sequence[Row],
    lines: list[Line],
    derived: list[tuple[float, float | None]],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Every number of the table, and the folders they come from."""
    found = [
        {
            "name": line.name, "method": line.method, "bits": line.bits, "weights": line.weights,
            "rotations": line.rotations, "seeds": line.seeds, "values": line.values, "recovery_percent": kept,
            "gap_closed_percent": closed, "serving": None if line.serving is None else asdict(line.serving),
        }
        for line, (kept, closed) in zip(lines, derived, strict=True)
    ]  # fmt: skip
    folders = [
        {"folder": str(row.folder), "seed": row.seed, "card_sha256": sha256_of(row.folder / CARD)}
        for row in rows
        if is_ours(row.folder)
    ]
    return {"model": results["model"], "measured": results["measured"], "lines": found, "folders": folders}
