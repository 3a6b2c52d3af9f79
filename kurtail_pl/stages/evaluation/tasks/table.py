"""The table of tasks: a line for each task and mean, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kurtail_pl.stages.evaluation.tasks.spec import MMLU, TASKS, ZERO_SHOT
from kurtail_pl.stages.tables import markdown


def measured_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models were asked the same questions."""
    return all(one[key] == other[key] for key in ("settings", "harness", "files_sha256"))


def tasks_table(models: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Markdown of what `evaluate_tasks` found, accuracies and standard errors in %.

    Args:
        models: name of the column and result of each; all were asked the same questions.
    """
    results = [result for _, result in models]
    found = results[0]
    lines: list[list[str]] = []

    def add(task: str, detail: Mapping[str, Any], cells: list[str]) -> None:
        lines.append([task, *(str(detail.get(key, "")) for key in ("metric", "split", "shots", "rows")), *cells])

    for name in (name for name in TASKS if name in found["tasks"]):
        tasks = [result["tasks"][name] for result in results]
        add(name, tasks[0], [_percent(task["value"], task["stderr"]) for task in tasks])
        for group in tasks[0].get("groups", {}):
            parts = [task["groups"][group] for task in tasks]
            cells = [_percent(part["acc"], part["acc_stderr"]) for part in parts]
            add(f"{MMLU}: {group.replace('_', ' ')}", {"rows": parts[0]["rows"]}, cells)
        if name == ZERO_SHOT[-1] and found["mean"] is not None:
            add("0-shot (mean of 8)", {}, [_percent(r["mean"], r["mean_stderr"]) for r in results])
    return markdown(["task", "metric", "split", "shots", "rows", *(name for name, _ in models)], lines)


def tasks_note(result: Mapping[str, Any]) -> str:
    """What the table says, in words."""
    skipped = "".join(f" Not run: {name} ({why})." for name, why in result["skipped"].items())
    return (
        f"Accuracy and its standard error in %, lm-evaluation-harness {result['harness']}; acc takes the answer of the "
        f"largest log-likelihood, acc_norm of the largest by length.{skipped}"
    )


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
