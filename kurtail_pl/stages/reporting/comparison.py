"""The comparison of several models in one table: Markdown, JSON, a picture and a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, read_results
from kurtail_pl.stages.reporting.figures.perplexity import draw_perplexity
from kurtail_pl.stages.reporting.page import Table, page_of, read_model, write_page
from kurtail_pl.stages.reporting.page.charts import bars
from kurtail_pl.stages.reporting.page.section import Section
from kurtail_pl.stages.tables import markdown
from kurtail_pl.stages.text import title_of
from kurtail_pl.storage.card import CARD, is_ours, read_card
from kurtail_pl.storage.files import gigabytes, sha256_of, whole_file, write_json, write_text

TABLE, DATA, CHART = "compare.md", "compare.json", "compare.png"
QUAROT = "quarot"


@dataclass(frozen=True)
class Row:
    """One measured model folder and the seed of its rotations."""

    folder: Path
    seed: int


@dataclass(frozen=True)
class Group:
    """One line of the table: a method at some bits and way to round, over all its seeds.

    Args:
        method: as results name it, such as ``kurtail``.
        bits: such as ``w4a4kv4``.
        weights: how they are rounded, such as ``rtn``; ``-`` where they stay float.
        seeds: of the rotations.
        values: for each seed, the measured numbers by name; absent ones were not measured.
        folders: the measured ones.
    """

    method: str
    bits: str
    weights: str
    seeds: list[int]
    values: list[dict[str, float]]
    folders: list[Path]

    @property
    def name(self) -> str:
        """All that tells it from the others."""
        return " ".join(dict.fromkeys((self.method, self.bits, *([] if self.weights == "-" else [self.weights]))))

    def of(self, name: str) -> list[float]:
        """A number of every seed; empty when any lacks it."""
        found = [values[name] for values in self.values if name in values]
        return found if len(found) == len(self.values) else []


def numbers_of(results: dict[str, Any]) -> dict[str, float]:
    """What a table shows of one model's results."""
    cost = results["cost"]
    making = [c["seconds"] for stage, c in cost.items() if stage != "evaluate"]
    numbers = {
        "perplexity": results["evaluation"]["perplexity"],
        "kurtosis_mean": results["kurtosis"]["mean"],
        "kurtosis_max": results["kurtosis"]["max"],
        "learn_seconds": cost.get("learn", {}).get("seconds", 0.0),
        "learn_cpu_seconds": cost.get("learn", {}).get("cpu_seconds", 0.0),
        "learn_peak_bytes": cost.get("learn", {}).get("peak_bytes", 0),
        "seconds": sum(making),
        "peak_bytes": max(c["peak_bytes"] for c in cost.values()),
    }
    tasks = results.get("tasks") or {}
    scores = {"zero_shot": tasks.get("mean"), "mmlu": tasks.get("mmlu"), "mathqa": tasks.get("mathqa")}
    return numbers | {name: value for name, value in scores.items() if value is not None}


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows by method, bits and rounding: the float model first, then by bits and rounding, as the rows came."""
    groups: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        results = read_results(row.folder)
        scheme = Scheme.from_dict(results["scheme"])
        rounding = read_card(row.folder)["rounding"] if is_ours(row.folder) else "-"
        key = results["method"], scheme.name, rounding if scheme.weights is not None else "-"
        group = groups.setdefault(key, Group(*key, [], [], []))
        group.seeds.append(row.seed)
        group.values.append(numbers_of(results))
        group.folders.append(row.folder)
    cells = list(dict.fromkeys((group.bits, group.weights) for group in groups.values()))
    return sorted(groups.values(), key=lambda g: (g.method != FLOAT_METHOD, cells.index((g.bits, g.weights))))


def recovery(group: Group, reference: Group, scored: bool) -> float:
    """Share of the float model's mean 0-shot accuracy that is kept, in percent; where not scored, of perplexity."""
    if scored:
        return 100 * mean(group.of("zero_shot")) / mean(reference.of("zero_shot"))
    return 100 * mean(reference.of("perplexity")) / mean(group.of("perplexity"))


def gap_closed(group: Group, quarot: Group | None, reference: Group) -> float | None:
    """How far from QuaRot's perplexity to the float model's, in percent; None without QuaRot at the same bits."""
    if quarot is None or quarot is group:
        return None
    begin, end = mean(quarot.of("perplexity")), mean(reference.of("perplexity"))
    return 100 * (begin - mean(group.of("perplexity"))) / (begin - end)


def write_comparison(rows: Sequence[Row], folder: Path) -> str:
    """Write `compare.md`, `compare.json`, `compare.png` and `report.html`; returns the Markdown.

    Args:
        rows: measured folders, all of one model on one text; the first is the float model.
        folder: where they go.
    """
    groups = groups_of(rows)
    reference = next(group for group in groups if group.method == FLOAT_METHOD)
    peers = {(g.bits, g.weights): g for g in groups if g.method == QUAROT}
    scored = all(group.of("zero_shot") for group in groups)
    derived = [
        (recovery(g, reference, scored), gap_closed(g, peers.get((g.bits, g.weights)), reference)) for g in groups
    ]
    columns, lines = _columns(groups), [_line(g, *more) for g, more in zip(groups, derived, strict=True)]
    results = read_results(rows[0].folder)
    table = Table(columns, [[line[column] for column in columns] for line in lines], _caption(results, groups, scored))
    text = f"{markdown(table.columns, table.rows)}\n\n{table.note}\n"
    write_text(folder / TABLE, f"# {results['model']}\n\n{text}")
    write_json(folder / DATA, _data(rows, groups, derived, results))
    chart = {(g.method, g.weights, g.bits): g.of("perplexity") for g in groups}
    with whole_file(folder / CHART) as temporary:
        draw_perplexity(chart, results["model"]).savefig(temporary, format="png")
    _write_page(groups, table, results["model"], folder)
    return text


def _write_page(groups: list[Group], table: Table, title: str, folder: Path) -> None:
    """The comparison as a page; of a group its first seed is shown, and the best group's folder in full."""
    models = [read_model(group.folders[0], group.name) for group in groups]
    ours = [model for model in models if model.card] or models
    chief = min(ours, key=lambda model: model.results["evaluation"]["perplexity"])
    methods = list(dict.fromkeys(group.method for group in groups))
    colours = {group.name: methods.index(group.method) for group in groups}
    chart = bars("Perplexity", {group.name: group.of("perplexity") for group in groups}, colours, "lower is better")
    several = "Below this table, of several seeds the first is shown." if len(groups[-1].seeds) > 1 else ""
    first = Section("Methods", several, [chart], [table])
    write_page(folder, page_of(title, models, chief, first))


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("kurtosis mean", "kurtosis_mean", "{:.2f}".format),
    ("kurtosis max", "kurtosis_max", "{:.2f}".format),
    ("perplexity", "perplexity", "{:.2f}".format),
    ("0-shot", "zero_shot", "{:.1%}".format),
    ("MMLU", "mmlu", "{:.1%}".format),
    ("MathQA", "mathqa", "{:.1%}".format),
)
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("learn s", "learn_seconds", "{:.0f}".format),
    ("learn CPU s", "learn_cpu_seconds", "{:.0f}".format),
    ("all s", "seconds", "{:.0f}".format),
    ("peak memory", "peak_bytes", gigabytes),
)
OPTIONAL = ("zero_shot", "mmlu", "mathqa")


def _columns(groups: list[Group]) -> tuple[str, ...]:
    shown = [head for head, name, _ in COLUMNS if name not in OPTIONAL or any(g.of(name) for g in groups)]
    return ("method", "bits", "weights", *shown, "recovery", "gap closed", *(head for head, _, _ in COSTS))


def _line(group: Group, kept: float, closed: float | None) -> dict[str, str]:
    cells = {"method": group.method, "bits": group.bits, "weights": group.weights}
    cells |= {head: _spread(group.of(name), show) for head, name, show in COLUMNS}
    cells |= {head: show(max(group.of(name), default=0.0)) for head, name, show in COSTS}
    cells["recovery"] = f"{kept:.1f} %"
    # Without rotations it would be thousands of percent the other way.
    cells["gap closed"] = "-" if closed is None else f"{closed:.0f} %" if closed > 0 else "< 0 %"
    return cells


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    """Mean, and smallest and largest when there are several."""
    if not values:
        return "-"
    several = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
    return f"{show(mean(values))}{several}"


def _caption(results: dict[str, Any], groups: list[Group], scored: bool) -> str:
    evaluation = results["evaluation"]
    seeds = max(len(group.seeds) for group in groups)
    over = f" Mean of {seeds} seeds of the rotations, smallest and largest in brackets." if seeds > 1 else ""
    kept = "0-shot accuracy" if scored else "perplexity (float's over its own)"
    return (
        f"Perplexity on {title_of(evaluation['source'])}: {evaluation['windows']} windows of {evaluation['seqlen']} "
        f"tokens, {evaluation['tokens']} predicted.{over} Kurtosis over the block inputs (1.8 is uniform, 3 normal) on "
        f"{results['kurtosis']['rows']} rows kept out of training. Recovery: of the float model's {kept}. Gap closed: "
        "from QuaRot's perplexity to the float model's. Seconds to learn, and to learn, fuse and quantize; peak "
        "resident memory of any stage, the largest of all seeds."
    )


def _data(
    rows: Sequence[Row],
    groups: list[Group],
    derived: list[tuple[float, float | None]],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Every number of the table, and the folders they come from."""
    lines = [
        {
            "method": group.method, "bits": group.bits, "weights": group.weights, "seeds": group.seeds,
            "values": group.values, "recovery_percent": kept, "gap_closed_percent": closed,
        }
        for group, (kept, closed) in zip(groups, derived, strict=True)
    ]  # fmt: skip
    folders = [
        {"folder": str(row.folder), "seed": row.seed, "card_sha256": sha256_of(row.folder / CARD)}
        for row in rows
        if is_ours(row.folder)
    ]
    return {"model": results["model"], "measured": results["measured"], "lines": lines, "folders": folders}
