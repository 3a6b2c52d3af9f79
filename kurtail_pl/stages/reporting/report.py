"""The table of methods, and the pages that travel with an artefact."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, RESULTS, read_results
from kurtail_pl.stages.evaluation.tasks.table import measured_alike, tasks_lines, tasks_note
from kurtail_pl.stages.reporting.model_card import model_card
from kurtail_pl.stages.reporting.page import Table, page_of, read_model, write_page
from kurtail_pl.stages.reporting.page.section import Section
from kurtail_pl.stages.tables import markdown
from kurtail_pl.stages.text import said, title_of
from kurtail_pl.storage.card import is_ours, read_card, require_sound
from kurtail_pl.storage.files import gigabytes, write_text
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.statement import MODEL_CARD

log = logging.getLogger(__name__)

REPORT = "report.md"
COLUMNS = ("method", "bits", "kurtosis mean", "kurtosis max", "perplexity", "seconds", "peak memory")


def siblings(folder: Path) -> list[dict[str, Any]]:
    """Results of a folder and of those beside it that measured the same model on the same windows.

    The float model comes first, then the highest perplexity: each line is better than the one above it.
    """
    own = read_results(folder)
    if "evaluation" not in own:
        raise ArtefactError(f"{folder} has no perplexity yet; run kurtail eval on it with --text and --store")

    def measured_on(results: dict[str, Any]) -> tuple[Any, ...]:
        evaluation = results["evaluation"]
        return (
            results["measured"]["model_sha256"],
            *(evaluation.get(key) for key in ("text_sha256", "windows", "seqlen", "bos", "dtype")),
        )

    found = [own]
    for beside in sorted(path.parent for path in folder.parent.glob(f"*/{RESULTS}")):
        try:
            found += [] if beside.resolve() == folder.resolve() else [read_results(beside)]
        except ArtefactError as error:
            log.warning("left out of the table: %s", error)
    rows = [results for results in found if "evaluation" in results and measured_on(results) == measured_on(own)]
    return sorted(rows, key=lambda r: (r["method"] != FLOAT_METHOD, -r["evaluation"]["perplexity"]))


def row(results: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; the seconds are those of making the model, the memory also that of measuring it."""
    making = [cost for stage, cost in results["cost"].items() if stage != "evaluate"]
    return (
        results["method"],
        Scheme.from_dict(results["scheme"]).name,
        f"{results['kurtosis']['mean']:.2f}",
        f"{results['kurtosis']['max']:.2f}",
        f"{results['evaluation']['perplexity']:.2f}",
        f"{sum(cost['seconds'] for cost in making):.0f}" if making else "-",
        gigabytes(max(cost["peak_bytes"] for cost in results["cost"].values())),
    )


def _note(results: Sequence[dict[str, Any]]) -> str:
    """What the table's numbers were measured on."""
    evaluation = results[0]["evaluation"]
    return (
        f"Perplexity on {title_of(evaluation['source'])}: {said(evaluation)}, "
        f"{evaluation['tokens']} predicted. Kurtosis over the {len(results[0]['kurtosis']['sites'])} block "
        f"inputs (1.8 is uniform, 3 normal) on {results[0]['kurtosis']['rows']} rows kept out of training. Seconds to "
        "capture what is learned from, learn, fuse and quantize; peak resident memory of any stage."
    )


def _tasks(own: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table | None:
    """The table of tasks of a folder and of those beside it that were asked the same; None when there is none."""
    if "tasks" not in own:
        return None
    columns = [
        (results["method"], results["tasks"])
        for results in rows
        if "tasks" in results and measured_alike(results["tasks"], own["tasks"])
    ]
    return Table(*tasks_lines(columns), tasks_note(own["tasks"]))


def _markdown(table: Table) -> str:
    return f"{markdown(table.columns, table.rows)}\n\n{table.note}\n"


def report(folder: Path) -> str:
    """Write `report.md`, `report.html` and the model card of an artefact and return the comparison, in Markdown.

    Raises:
        ArtefactError: when the folder has no results, or a file of the artefact is missing or damaged.
    """
    if not folder.is_dir():
        raise ArtefactError(f"artefact {folder} does not exist; name a folder that kurtail fit or quantize made")
    require_sound(folder)
    own, found = read_results(folder), siblings(folder)
    methods, tasks = Table(COLUMNS, [row(results) for results in found], _note(found)), _tasks(own, found)
    text = _markdown(methods) + ("" if tasks is None else f"\n{_markdown(tasks)}")
    card = read_card(folder) if is_ours(folder) else {}
    exceptions = _exceptions(card)
    said = (
        "\n".join(["\n## Exceptions\n", *(f"- `{name}`: {why}" for name, why in exceptions), ""]) if exceptions else ""
    )
    with alone_with(folder / REPORT):
        write_text(folder / REPORT, f"# {folder.name}\n\n{text}{said}")
        tables = Section("Methods", tables=[table for table in (methods, tasks) if table is not None])
        unlike = Section("Exceptions", tables=[Table(("linear", "what was done"), exceptions)]) if exceptions else None
        model = read_model(folder)
        write_page(folder, page_of(folder.name, [model], model, tables, unlike))
        if card:
            own_tasks = _tasks(own, [own])
            page = model_card(folder, card, own, "" if own_tasks is None else f"\n{_markdown(own_tasks)}")
            write_text(folder / MODEL_CARD, page + said)
    return text


def is_reported(folder: Path) -> bool:
    """Whether all pages of an artefact were written: the model card is the last."""
    return (folder / MODEL_CARD).is_file()


def _exceptions(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Weights that were not quantized as the rest, and what was done with them."""
    fallbacks, borrowers, tokens = (card.get(key, {}) for key in ("fallbacks", "borrowers", "expert_tokens"))
    return [
        *((name, "left to plain rounding, its Hessian was not positive definite") for name in fallbacks),
        *(
            (name, f"{tokens.get(name, 0)} calibration tokens of its own, the rest borrowed from its block")
            for name in borrowers
        ),
    ]
