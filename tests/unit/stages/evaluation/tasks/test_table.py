"""The table of tasks."""

from typing import Any

import pytest

from kurtail_pl.stages.evaluation.tasks.spec import MMLU, TASKS
from kurtail_pl.stages.evaluation.tasks.table import measured_alike, tasks_note, tasks_table


def result(value: float, *names: str) -> dict[str, Any]:
    """What `evaluate_tasks` gives, made up."""
    task = {"metric": "acc", "value": value, "stderr": 0.0123, "split": "test", "rows": 200, "shots": 0}
    group = {"acc": value / 2, "acc_stderr": None, "rows": 40}
    tasks: dict[str, Any] = {name: dict(task) for name in names}
    if MMLU in tasks:
        tasks[MMLU] |= {"shots": 5, "groups": {"social_sciences": group, "other": group}}
    mean = value if set(names) > set(TASKS[:8]) else None
    return {
        "tasks": tasks, "mean": mean, "mean_stderr": 0.004, "skipped": {"mathqa": "no file x"}, "harness": "0.4.13",
        "settings": {"limit": 200}, "files_sha256": {"a": "b"},
    }  # fmt: skip


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_line_for_each_task_and_mean_a_column_for_each_model() -> None:
    table = cells(tasks_table([("float", result(0.5, *TASKS)), ("KurTail", result(0.4567, *TASKS))]))
    assert table[0] == ["task", "metric", "split", "shots", "rows", "float", "KurTail"]
    groups = [f"mmlu: {group}" for group in ("social sciences", "other")]
    assert [line[0] for line in table[2:]] == [*TASKS[:8], "0-shot (mean of 8)", "mmlu", *groups, "mathqa"]
    assert table[2] == ["boolq", "acc", "test", "0", "200", "50.0 ± 1.2", "45.7 ± 1.2"]
    assert table[10] == ["0-shot (mean of 8)", "", "", "", "", "50.0 ± 0.4", "45.7 ± 0.4"]
    assert table[11] == ["mmlu", "acc", "test", "5", "200", "50.0 ± 1.2", "45.7 ± 1.2"]
    assert table[12] == ["mmlu: social sciences", "", "", "", "40", "25.0", "22.8"]


def test_some_tasks_have_no_mean() -> None:
    table = cells(tasks_table([("float", result(0.5, "piqa", "arc_challenge"))]))
    assert [line[0] for line in table[2:]] == ["piqa", "arc_challenge"]


def test_the_note_names_the_harness_and_what_was_not_run() -> None:
    note = tasks_note(result(0.5, "piqa"))
    assert "lm-evaluation-harness 0.4.13" in note
    assert "Not run: mathqa (no file x)." in note


@pytest.mark.parametrize("key", ["settings", "harness", "files_sha256"])
def test_other_questions_are_not_compared(key: str) -> None:
    one = result(0.5, "piqa")
    assert measured_alike(one, result(0.6, "piqa"))
    assert not measured_alike(one, {**one, key: "other"})
