"""The harness's tasks on local rows: prompts, shares of MMLU's subjects, and what is refused."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from task_rows import read_rows

from kurtail_pl.errors import ConfigError, HarnessMissing, TextError
from kurtail_pl.stages.tasks.harness import deal, parts_of
from kurtail_pl.stages.tasks.spec import TASKS, TaskSpec, chosen_tasks


@pytest.fixture
def own(task_rows: Path, tmp_path: Path) -> Path:
    """A copy of the rows that a test may spoil."""
    return shutil.copytree(task_rows, tmp_path / "tasks")


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_mmlu_prompts_hold_the_first_examples_of_their_subject(task_rows: Path, shots: int) -> None:
    asked, examples = read_rows(task_rows / "mmlu" / "test.jsonl"), read_rows(task_rows / "mmlu" / "dev.jsonl")

    def block(row: dict[str, Any]) -> str:
        choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True))
        return f"{row['question']}\n{choices}Answer:"

    expected = []
    for row in asked:
        own = [example for example in examples if example["subject"] == row["subject"]][:shots]
        shown = [f"{block(example)} {'ABCD'[example['answer']]}\n\n" for example in own]
        head = f"The following are multiple choice questions (with answers) about {row['subject']}.\n\n"
        expected += [(head + "".join(shown) + block(row), f" {letter}") for letter in "ABCD"]
    parts = parts_of("mmlu", TaskSpec(folder=str(task_rows), mmlu_shots=shots))
    assert sorted(request.args for part in parts for request in part.requests()) == sorted(expected)
    groups = {part.name: part.group for part in parts}
    assert groups == {
        "mmlu_philosophy": "humanities", "mmlu_anatomy": "stem", "mmlu_astronomy": "stem", "mmlu_virology": "other"
    }  # fmt: skip


def test_mmlus_limit_is_dealt_out_over_its_subjects(task_rows: Path) -> None:
    """1, 8, 3 and 2 of 14 rows: 0.57, 4.57, 1.71 and 1.14 of 8; of two equal remainders the first is rounded up."""
    parts = parts_of("mmlu", TaskSpec(folder=str(task_rows), limit=8))
    asked = {part.name: len(part.requests()) // 4 for part in parts}
    assert asked == {"mmlu_philosophy": 1, "mmlu_anatomy": 4, "mmlu_astronomy": 2, "mmlu_virology": 1}


@pytest.mark.parametrize("sizes", [[100, 200, 300], [1, 1, 1], [7, 0, 3, 90], [1534, 895, 100, 112, 171]])
@pytest.mark.parametrize("total", [1, 2, 17, 93, 10_000])
def test_deal_is_fair(sizes: list[int], total: int) -> None:
    shares = deal(total, sizes)
    whole = sum(sizes)
    assert sum(shares) == min(total, whole)
    for share, size in zip(shares, sizes, strict=True):
        assert abs(share - min(total, whole) * size / whole) < 1
        assert share <= size


@pytest.mark.parametrize("limit", [None, 3, 50])
def test_the_first_rows_are_asked(task_rows: Path, limit: int | None) -> None:
    (part,) = parts_of("piqa", TaskSpec(folder=str(task_rows), limit=limit))
    expected = [
        (f"Question: {row['goal']}\nAnswer:", f" {row[solution]}")
        for row in read_rows(task_rows / "piqa" / "validation.jsonl")[:limit]
        for solution in ("sol1", "sol2")
    ]
    assert [request.args for request in part.requests()] == expected


def test_prompts_that_need_the_harness_own_functions(task_rows: Path) -> None:
    spec = TaskSpec(folder=str(task_rows))
    (row, *_), (winogrande,) = read_rows(task_rows / "winogrande" / "validation.jsonl"), parts_of("winogrande", spec)
    before, after = row["sentence"].split("_")
    expected = [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]
    assert [request.args for request in winogrande.requests()[:2]] == expected

    (row, *_), (hellaswag,) = read_rows(task_rows / "hellaswag" / "validation.jsonl"), parts_of("hellaswag", spec)
    context = f"Sailing: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    assert [request.args for request in hellaswag.requests()[:4]] == [(context, f" {end}") for end in row["endings"]]

    (mathqa,) = parts_of("mathqa", spec)
    answers = [request.args[1] for request in mathqa.requests()[:5]]
    assert answers == [" 38", " 27.675", " 30", " data inadequate", " none of these"]


def test_a_task_without_a_file_is_skipped_or_refused(own: Path) -> None:
    assert chosen_tasks(TaskSpec(folder=str(own))) == (list(TASKS), {})
    shutil.rmtree(own / "mathqa")
    (own / "mmlu" / "dev.jsonl").unlink()
    names, skipped = chosen_tasks(TaskSpec(folder=str(own)))
    assert names == list(TASKS[:8])
    assert skipped == {
        "mathqa": f"no file {own / 'mathqa' / 'test.jsonl'}", "mmlu": f"no file {own / 'mmlu' / 'dev.jsonl'}"
    }  # fmt: skip
    assert "mmlu" in chosen_tasks(TaskSpec(folder=str(own), mmlu_shots=0))[0]
    with pytest.raises(TextError, match=r"mathqa: no file .*test\.jsonl"):
        chosen_tasks(TaskSpec(names="piqa,mathqa", folder=str(own)))


def test_folders_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"holds no task.*boolq"):
        chosen_tasks(TaskSpec(folder=str(tmp_path)))
    with pytest.raises(TextError, match="nowhere does not exist"):
        chosen_tasks(TaskSpec(folder=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("piqa", "validation", "", "has no rows"),
        ("piqa", "validation", "[1]\n", "no JSON objects"),
        ("piqa", "validation", "{'goal': 1}\n", "not made of lines of JSON"),
        ("piqa", "validation", '{"goal": "x"}\n', "rows of piqa lack"),
        ("hellaswag", "validation", '{"goal": "x"}\n', "rows of hellaswag lack"),
        ("mmlu", "test", '{"question": "x", "subject": "sailing"}\n', "subject 'sailing'"),
    ],
)
def test_unusable_rows_are_refused(own: Path, name: str, file: str, content: str, message: str) -> None:
    (own / name / f"{file}.jsonl").write_text(content)
    with pytest.raises(TextError, match=message):
        parts_of(name, TaskSpec(folder=str(own)))


def test_more_examples_than_there_are_are_refused(task_rows: Path) -> None:
    with pytest.raises(ConfigError, match=r"mmlu_shots is 7, but mmlu_\w+ has 6 examples"):
        parts_of("mmlu", TaskSpec(folder=str(task_rows), mmlu_shots=7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("boolq", "sailing")}, "'sailing' is unknown; choose from boolq, "),
        ({"names": "boolq,"}, "'' is unknown"),
        ({"names": ()}, "name each task once"),
        ({"names": "boolq,piqa,boolq"}, "name each task once"),
        ({"limit": 0}, "limit is 0"),
        ({"mmlu_shots": -1}, "mmlu_shots is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskSpec(**settings)


def test_names_are_a_list_or_a_text() -> None:
    assert TaskSpec(names="piqa, boolq") == TaskSpec(names=("piqa", "boolq"))
    assert chosen_tasks(TaskSpec(names="piqa,boolq"))[0] == ["boolq", "piqa"]


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(HarnessMissing, match=r"package lm_eval; run: pip install 'kurtail-pl\[eval\]'"):
        chosen_tasks(TaskSpec())
