"""Local rows of tasks: the fields that the harness reads, and answers that are among the choices.

The harness counts a row whose answer it cannot find as wrong and goes on: here such a row is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kurtail_pl.errors import TextError, shortened
from kurtail_pl.stages.evaluation.tasks.spec import MATHQA, MMLU
from kurtail_pl.storage.reading import Unreadable, json_lines, kind_of, read_utf8

Check = Callable[[Any, Mapping[str, Any]], str | None]
"""A field's value and its row -> what was expected instead; None where it is right."""


def _text(value: Any, row: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str):
        return "text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "text without halves of characters"
    return None


def _answer(value: Any, row: Mapping[str, Any]) -> str | None:
    """Scores are divided by the length of an answer."""
    return _text(value, row) or (None if value.strip() else "text that is not empty")


def _texts(value: Any, row: Mapping[str, Any]) -> str | None:
    alike = isinstance(value, list) and len(value) > 1 and not any(_answer(each, row) for each in value)
    return None if alike else "a list of texts"


def _four(value: Any, row: Mapping[str, Any]) -> str | None:
    return None if _texts(value, row) is None and len(value) == 4 else "a list of four texts"


def _lettered(value: Any, row: Mapping[str, Any]) -> str | None:
    """Choices and their letters, as ARC and OpenBookQA have them."""
    parts = [value.get("text"), value.get("label")] if isinstance(value, dict) else [None]
    alike = all(_texts(part, row) is None for part in parts) and len({len(part) for part in parts if part}) == 1
    return None if alike else "an object of two lists alike in length, text and label"


def _letter(value: Any, row: Mapping[str, Any]) -> str | None:
    known = row["choices"]["label"]
    return None if isinstance(value, str) and value.lstrip() in known else f"one of {', '.join(known)}"


def _gap(value: Any, row: Mapping[str, Any]) -> str | None:
    return _text(value, row) or (None if "_" in value else "text with a gap _")


def _number(first: int, last: int) -> Check:
    """A whole number, as one: the harness takes a text for an answer that is no choice."""
    expected = f"a number from {first} to {last}"
    return lambda value, row: None if type(value) is int and first <= value <= last else expected


def _one_of(*known: Any) -> Check:
    expected = f"one of {', '.join(map(repr, known))}"
    return lambda value, row: None if any(value == each and type(value) is type(each) for each in known) else expected


def _ending(value: Any, row: Mapping[str, Any]) -> str | None:
    known = [each for index in range(len(row["endings"])) for each in (index, str(index))]
    return _one_of(*known)(value, row)


LETTERED = {"choices": _lettered, "answerKey": _letter}
FIELDS: dict[str, dict[str, Check]] = {
    "boolq": {"passage": _text, "question": _text, "label": _number(0, 1)},
    "hellaswag": {"activity_label": _text, "ctx_a": _text, "ctx_b": _text, "endings": _texts, "label": _ending},
    "openbookqa": {"question_stem": _text, **LETTERED},
    "piqa": {"goal": _text, "sol1": _answer, "sol2": _answer, "label": _number(0, 1)},
    "social_iqa": {
        **dict.fromkeys(("context", "question"), _text),
        **dict.fromkeys(("answerA", "answerB", "answerC"), _answer),
        "label": _one_of("1", "2", "3", 1, 2, 3),
    },
    "winogrande": {"sentence": _gap, "option1": _answer, "option2": _answer, "answer": _one_of("1", "2")},
    "arc_easy": {"question": _text, **LETTERED},
    "arc_challenge": {"question": _text, **LETTERED},
    MMLU: {"question": _text, "subject": _text, "choices": _four, "answer": _number(0, 3)},
    MATHQA: {"Problem": _text, "options": _text, "correct": _one_of(*"abcde")},
}
"""Task -> the fields of the harness's own data set that it reads; a check may look at those before it."""


def read_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file, with the fields that the harness reads.

    Args:
        path: of the file.
        task: whose rows they are.

    Raises:
        TextError: naming file, line and field, when a row lacks a field or holds something else in it.
    """
    fields = FIELDS[task]
    try:
        rows = [_checked(row, fields, number) for number, row in json_lines(read_utf8(path))]
    except Unreadable as error:
        raise TextError(f"{path} {error}; {task} reads {', '.join(fields)} from each line") from error
    if not rows:
        raise TextError(f"{path} has no rows; give one JSON object in each line, with {', '.join(fields)}")
    return rows


def _checked(row: dict[str, Any], fields: Mapping[str, Check], number: int) -> dict[str, Any]:
    for name, check in fields.items():
        if name not in row:
            there = ", ".join(repr(shortened(each, 20)) for each in list(row)[:4]) or "none"
            raise Unreadable(f"line {number} has no field {name!r} (its fields: {there})")
        expected = check(row[name], row)
        if expected is not None:
            value = row[name]
            shown = kind_of(value) if isinstance(value, list | dict) else shortened(repr(value), 40)
            raise Unreadable(f"line {number} has {shown} as its {name!r}, expected {expected}")
    return {name: row[name] for name in fields}
