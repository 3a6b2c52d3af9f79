"""The lines of a comparison: models that differ in their seeds alone, what is shown of them, and its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, read_results
from kurtail_pl.stages.reporting.page import Table
from kurtail_pl.stages.reporting.serving import OWN_RUNTIME, Serving
from kurtail_pl.stages.text import said, title_of
from kurtail_pl.storage.card import is_ours, read_card
from kurtail_pl.storage.files import gigabytes

Show = Callable[[float], str]
QUALITY: tuple[tuple[str, str, Show], ...] = (
    ("kurtosis mean", "kurtosis_mean", "{:.2f}".format),
    ("kurtosis max", "kurtosis_max", "{:.2f}".format),
    ("perplexity", "perplexity", "{:.2f}".format),
    ("0-shot", "zero_shot", "{:.1%}".format),
    ("MMLU", "mmlu", "{:.1%}".format),
    ("MathQA", "mathqa", "{:.1%}".format),
)
COSTS: tuple[tuple[str, str, Show], ...] = (
    ("learn CPU s", "learn_cpu_seconds", "{:.0f}".format),
    ("all s", "seconds", "{:.0f}".format),
    ("all CPU s", "cpu_seconds", "{:.0f}".format),
    ("peak memory", "peak_bytes", gigabytes),
)


@dataclass(frozen=True)
class Row:
    """One measured model folder.

    Args:
        folder: with results.
        seed: of its rotations.
        name: of the system that it is; its method if not given.
    """

    folder: Path
    seed: int
    name: str | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table: a system at some bits and way to round, over all its seeds.

    Args:
        name: of the system, or its method.
        method: as results have it, such as ``kurtail``.
        bits: such as ``w4a4kv4``.
        weights: how they are rounded, such as ``rtn``; ``-`` where they stay float.
        rotations: how these were made, such as ``quarot``; ``none`` for none.
        seeds: of the rotations.
        values: for each seed, the measured numbers by name; absent ones were not measured.
        folders: the measured ones.
        serving: what they take where they are used; None where nobody looked.
    """

    name: str
    method: str
    bits: str
    weights: str
    rotations: str
    seeds: list[int]
    values: list[dict[str, float]]
    folders: list[Path]
    serving: Serving | None

    @property
    def title(self) -> str:
        """All that tells it from the others."""
        return " ".join(dict.fromkeys((self.name, self.bits, *([] if self.weights == "-" else [self.weights]))))

    def of(self, name: str) -> list[float]:
        """A number of every seed; empty when any lacks it."""
        found = [values[name] for values in self.values if name in values]
        return found if len(found) == len(self.values) else []


def numbers_of(results: Mapping[str, Any]) -> dict[str, float]:
    """What a table shows of one model's results."""
    cost = results["cost"]
    making = [spent for stage, spent in cost.items() if stage != "evaluate"]
    # What is learned from has to be captured first.
    learning = [cost[stage] for stage in ("capture", "learn") if stage in cost and "learn" in cost]
    numbers = {
        "perplexity": results["evaluation"]["perplexity"],
        "kurtosis_mean": results["kurtosis"]["mean"],
        "kurtosis_max": results["kurtosis"]["max"],
        "learn_seconds": sum(spent["seconds"] for spent in learning),
        "learn_cpu_seconds": sum(spent["cpu_seconds"] for spent in learning),
        "learn_peak_bytes": max((spent["peak_bytes"] for spent in learning), default=0),
        "seconds": sum(spent["seconds"] for spent in making),
        "cpu_seconds": sum(spent["cpu_seconds"] for spent in making),
        "peak_bytes": max(spent["peak_bytes"] for spent in cost.values()),
    }
    tasks = results.get("tasks") or {}
    scores = {"zero_shot": tasks.get("mean"), "mmlu": tasks.get("mmlu"), "mathqa": tasks.get("mathqa")}
    return numbers | {name: value for name, value in scores.items() if value is not None}


def lines_of(rows: Sequence[Row], look: Callable[[Path], Serving] | None = None) -> list[Line]:
    """Rows by system, bits and rounding: the float model first, then by bits and rounding, as the rows came.

    Args:
        rows: measured folders.
        look: how what an artefact takes where it is used is found; of several seeds the first is looked at.
    """
    found: dict[tuple[str, ...], Line] = {}
    for row in rows:
        results, ours = read_results(row.folder), is_ours(row.folder)
        card = read_card(row.folder) if ours else {}
        scheme = Scheme.from_dict(results["scheme"])
        weights = card["rounding"] if ours and scheme.weights is not None else "-"
        key = row.name or results["method"], results["method"], scheme.name, weights
        if key not in found:
            rotations = str(card.get("rotations", {}).get("method", "none"))
            served = None if look is None else look(row.folder) if ours else Serving()
            found[key] = Line(*key, rotations, [], [], [], served)
        found[key].seeds.append(row.seed)
        found[key].values.append(numbers_of(results))
        found[key].folders.append(row.folder)
    cells = list(dict.fromkeys((line.bits, line.weights) for line in found.values()))
    return sorted(
        found.values(), key=lambda line: (line.method != FLOAT_METHOD, cells.index((line.bits, line.weights)))
    )


def recovery(line: Line, reference: Line, scored: bool) -> float:
    """Share of the float model's mean 0-shot accuracy that is kept, in percent; where not scored, of perplexity."""
    if scored:
        return 100 * mean(line.of("zero_shot")) / mean(reference.of("zero_shot"))
    return 100 * mean(reference.of("perplexity")) / mean(line.of("perplexity"))


def gap_closed(line: Line, quarot: Line | None, reference: Line) -> float | None:
    """How far from QuaRot's perplexity to the float model's, in percent; None without QuaRot at the same bits."""
    if quarot is None or quarot is line:
        return None
    begin, end = mean(quarot.of("perplexity")), mean(reference.of("perplexity"))
    return 100 * (begin - mean(line.of("perplexity"))) / (begin - end)


def table_of(lines: Sequence[Line], derived: Sequence[tuple[float, float | None]], note: str) -> Table:
    """The table, without the columns that no line has anything to say in.

    Args:
        lines: in their order.
        derived: recovery and gap closed of each.
        note: below the table.
    """
    cells = [dict(_cells(line, *more)) for line, more in zip(lines, derived, strict=True)]
    unsaid = {name for name in cells[0] if name in SPARSE and all(line[name] == "-" for line in cells)}
    if all(line.name == line.method for line in lines):
        unsaid.add("rotations")  # The method says it.
    columns = [name for name in cells[0] if name not in unsaid]
    return Table(columns, [[line[column] for column in columns] for line in cells], note)


SPARSE = ("0-shot", "MMLU", "MathQA", "gap closed", "bits a weight", "bits of the cache", "more products",
          "runs in")  # fmt: skip
"""Columns that are left out where they hold nothing."""


def _cells(line: Line, kept: float, closed: float | None) -> Iterator[tuple[str, str]]:
    yield "method", line.name
    yield "bits", line.bits
    yield "weights", line.weights
    yield "rotations", line.rotations
    yield "bits a weight", "-" if line.serving is None else f"{line.serving.weight_bits:.2f}"
    cache = None if line.serving is None else line.serving.cache_bits
    yield "bits of the cache", "-" if cache is None else f"{cache:.2f}"
    for head, name, show in QUALITY:
        yield head, _spread(line.of(name), show)
    yield "recovery", f"{kept:.1f} %"
    # Without rotations it would be thousands of percent the other way.
    yield "gap closed", "-" if closed is None else f"{closed:.0f} %" if closed > 0 else "< 0 %"
    for head, name, show in COSTS:
        yield head, show(max(line.of(name), default=0.0))
    yield "more products", _products(line.serving)
    yield "runs in", ", ".join(line.serving.runtimes) if line.serving and line.method != FLOAT_METHOD else "-"


def _products(serving: Serving | None) -> str:
    """Multiplications beside the linears' own, and their share of these."""
    if serving is None:
        return "-"
    more = serving.multiplications
    return f"{more / 1e6:.2f} M ({100 * more / serving.own:.1f} %)" if more else "0"


def _spread(values: list[float], show: Show) -> str:
    """Mean, and smallest and largest when there are several."""
    if not values:
        return "-"
    several = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
    return f"{show(mean(values))}{several}"


def note_of(results: Mapping[str, Any], lines: Sequence[Line], scored: bool) -> str:
    """What the numbers of a table are and were measured on."""
    evaluation = results["evaluation"]
    seeds = max(len(line.seeds) for line in lines)
    over = f" Mean of {seeds} seeds of the rotations, smallest and largest in brackets." if seeds > 1 else ""
    kept = "0-shot accuracy" if scored else "perplexity (float's over its own)"
    closed = " Gap closed: from QuaRot's perplexity to the float model's."
    served = (
        " Bits a weight and of the cache: all that is stored for a number, scales, sides and outliers included. More "
        "products: multiplications of a token by rotations, maps and sides at run time, and their share of those of "
        f"the linears. Runs in: {OWN_RUNTIME} is kurtail_pl.load, others take the export by its own rules."
    )
    return (
        f"Perplexity on {title_of(evaluation['source'])}: {said(evaluation)}, "
        f"{evaluation['tokens']} predicted.{over} Kurtosis over the block inputs (1.8 is uniform, 3 normal) on "
        f"{results['kurtosis']['rows']} rows kept out of training. Recovery: of the float model's {kept}."
        f"{closed} Seconds to learn: to capture what is learned from, and learn. All seconds: to fuse and quantize, "
        f"too; peak resident memory of any stage, the largest of all seeds.{served if lines[-1].serving else ''}"
    )
