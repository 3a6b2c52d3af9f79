"""Made-up rows of all ten tasks, with the fields of the harness's own data sets."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = "old king queen dragon river castle bread ran found lost sang the a under behind green silver heavy"
ROWS = 7
SUBJECTS = {"anatomy": 8, "astronomy": 3, "virology": 2, "philosophy": 1}
"""Subjects of MMLU and how many rows each has; one or so of every group but the social sciences."""


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _phrase(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS.split(), k=draw.randint(low, high)))


def question(draw: random.Random, name: str, subject: str = "") -> dict[str, Any]:
    """One row of a task, answers drawn at random."""
    first, second = (f"{_phrase(draw, 4, 9).capitalize()}." for _ in range(2))
    four = [_phrase(draw, 2, 5) for _ in range(4)]
    lettered = {"choices": {"text": four, "label": list("ABCD")}, "answerKey": draw.choice("ABCD")}
    return {
        "boolq": {"passage": first, "question": second, "label": draw.randint(0, 1)},
        "hellaswag": {
            "activity_label": "Sailing", "ctx_a": first, "ctx_b": four[0], "endings": four,
            "label": str(draw.randint(0, 3)),
        },
        "openbookqa": {"question_stem": first, **lettered},
        "piqa": {"goal": first, "sol1": four[0], "sol2": four[1], "label": draw.randint(0, 1)},
        "social_iqa": {
            "context": first, "question": second, "answerA": four[0], "answerB": four[1], "answerC": four[2],
            "label": str(draw.randint(1, 3)),
        },
        "winogrande": {
            "sentence": f"The king lost _ and {four[0]}.", "option1": four[1], "option2": four[2],
            "answer": draw.choice("12"),
        },
        "arc_easy": {"question": first, **lettered},
        "arc_challenge": {"question": first, **lettered},
        "mmlu": {"question": first, "subject": subject, "choices": four, "answer": draw.randint(0, 3)},
        "mathqa": {
            "Problem": first, "options": "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these",
            "correct": draw.choice("abcde"),
        },
    }[name]  # fmt: skip


def write_tasks(place: Path) -> Path:
    """Rows of all ten tasks, as JSONL."""
    draw = random.Random(7)
    for name in ("boolq", "hellaswag", "piqa", "social_iqa", "winogrande"):
        _write(place / name / "validation.jsonl", [question(draw, name) for _ in range(ROWS)])
    for name in ("openbookqa", "arc_easy", "arc_challenge", "mathqa"):
        _write(place / name / "test.jsonl", [question(draw, name) for _ in range(ROWS)])
    asked = [question(draw, "mmlu", subject) for subject, count in SUBJECTS.items() for _ in range(count)]
    _write(place / "mmlu" / "test.jsonl", asked)
    _write(place / "mmlu" / "dev.jsonl", [question(draw, "mmlu", s) for _ in range(6) for s in SUBJECTS])
    return place


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
