"""The table of tasks: a line for each task and mean, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kurtail_pl.stages.evaluation.tasks.spec import MMLU, TASKS, ZERO_SHOT
from kurtail_pl.stages.tables import markdown

DETAILS = ("metric", "split", "shots", "rows")


def measured_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models were asked the same questions."""
    return all(one[key] == other[key] for key in ("settings", "harness", "files_sha256"))


def tasks_table(models: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Markdown of what `evaluate_tasks` found; see `tasks_lines`."""
    return markdown(*tasks_lines(models))


def tasks_lines(models: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of what `evaluate_tasks` found, accuracies and standard errors in %.

    Args:
        models: name of the column and result of each; all were asked the same questions.
    """
    results = [result for _, result in models]
    lines: list[list[str]] = []
    for name in (name for name in TASKS if name in results[0]["tasks"]):
        lines += _lines_of(name, [result["tasks"][name] for result in results])
        if name == ZERO_SHOT[-1] and results[0]["mean"] is not None:
            cells = [_percent(result["mean"], result["mean_stderr"]) for result in results]
            lines.append(_line("0-shot (mean of 8)", {}, cells))
    return ["task", *DETAILS, *(name for name, _ in models)], lines


def _lines_of(name: str, tasks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of one task, as each model did it, and of its groups."""
    lines = [_line(name, tasks[0], [_percent(task["value"], task["stderr"]) for task in tasks])]
    for group in tasks[0].get("groups", {}):
        parts = [task["groups"][group] for task in tasks]
        cells = [_percent(part["acc"], part["acc_stderr"]) for part in parts]
        lines.append(_line(f"{MMLU}: {group.replace('_', ' ')}", {"rows": parts[0]["rows"]}, cells))
    return lines


def _line(task: str, details: Mapping[str, Any], cells: list[str]) -> list[str]:
    return [task, *(str(details.get(key, "")) for key in DETAILS), *cells]


def tasks_note(result: Mapping[str, Any]) -> str:
    """What the table says, in words."""
    skipped = "".join(f" Not run: {name} ({why})." for name, why in result["skipped"].items())
    return (
        f"Accuracy and its standard error in %, lm-evaluation-harness {result['harness']}; acc takes the answer of the "
        f"largest log-likelihood, acc_norm of the largest by length.{skipped}"
    )


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
