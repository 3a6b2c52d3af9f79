"""The harness's tasks on local rows: prompts, shares of MMLU's subjects, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from task_rows import read_rows

from kurtail_pl.errors import ConfigError, HarnessMissing, TextError
from kurtail_pl.stages.evaluation.tasks.harness import deal, parts_of
from kurtail_pl.stages.evaluation.tasks.spec import TASKS, TaskSpec, chosen_tasks, split_of


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


UNUSABLE = [
    ("piqa", {"label": -1}, "line 2 has -1 as its 'label', expected a number from 0 to 1"),
    ("piqa", {"label": "1"}, "line 2 has '1' as its 'label', expected a number"),
    ("piqa", {"sol1": ""}, "line 2 has '' as its 'sol1', expected text"),
    ("piqa", {"goal": "\ud83d"}, "'goal', expected text without halves of characters"),
    ("boolq", {"label": True}, "line 2 has True as its 'label'"),
    ("hellaswag", {"label": ""}, "line 2 has '' as its 'label', expected one of 0, '0', 1, '1'"),
    ("hellaswag", {"endings": "a"}, "line 2 has 'a' as its 'endings', expected a list of texts"),
    ("openbookqa", {"answerKey": "F"}, "line 2 has 'F' as its 'answerKey', expected one of A, B, C, D"),
    ("arc_easy", {"choices": ["a", "b"]}, "line 2 has a list as its 'choices', expected an object of two lists"),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "expected an object of two lists"),
    ("social_iqa", {"label": "0"}, "line 2 has '0' as its 'label', expected one of '1', '2', '3', 1, 2, 3"),
    ("winogrande", {"answer": 1}, "line 2 has 1 as its 'answer', expected one of '1', '2'"),
    ("winogrande", {"sentence": "No gap."}, "expected text with a gap _"),
    ("mathqa", {"correct": "f"}, "line 2 has 'f' as its 'correct', expected one of 'a'"),
    ("mmlu", {"choices": ["a", "b"]}, "line 2 has a list as its 'choices', expected a list of four texts"),
    ("mmlu", {"answer": "B"}, "line 2 has 'B' as its 'answer', expected a number from 0 to 3"),
    ("mmlu", {"subject": "sailing"}, "of the subject 'sailing', which MMLU does not have"),
]


@pytest.mark.parametrize(("name", "change", "message"), UNUSABLE, ids=[f"{n}-{c}" for n, c, _ in UNUSABLE])
def test_rows_with_other_values_are_refused(own: Path, name: str, change: dict[str, Any], message: str) -> None:
    """The second row is the first one with something changed."""
    file = own / name / f"{split_of(name)}.jsonl"
    good = read_rows(file)[0]
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change})))
    with pytest.raises(TextError, match=rf"{file.name} .*{message}") as caught:
        parts_of(name, TaskSpec(folder=str(own)))
    assert len(str(caught.value).replace(str(own), "")) < 250


def test_options_that_the_harness_cannot_take_apart(own: Path) -> None:
    file = own / "mathqa" / "test.jsonl"
    rows = [{**row, "options": "all of them"} for row in read_rows(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TextError, match="the local rows of mathqa are not as the harness reads them"):
        parts_of("mathqa", TaskSpec(folder=str(own)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows; give one JSON object in each line, with goal, sol1, sol2, label"),
        ("[1]\n", "line 1 holds a list, expected an object"),
        ("{'goal': 1}\n", "line 1 is not JSON"),
        ('\n{"goal": "x"}\n', r"line 2 has no field 'sol1' \(its fields: 'goal'\); piqa reads goal, sol1, sol2, label"),
        ('{"question": "a"}\n', "line 1 has no field 'goal'"),
    ],
)
def test_files_without_the_rows_of_a_task_are_refused(own: Path, content: str, message: str) -> None:
    (own / "piqa" / "validation.jsonl").write_text(content)
    with pytest.raises(TextError, match=rf"validation.jsonl {message}"):
        parts_of("piqa", TaskSpec(folder=str(own)))


def test_without_the_hub_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(TextError, match=r"rows of piqa cannot be had .*give a folder"):
        parts_of("piqa", TaskSpec())


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
