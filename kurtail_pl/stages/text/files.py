"""Rows of text in local files."""

from __future__ import annotations

import io
import json
from pathlib import Path

from kurtail_pl.errors import TextError

SUFFIXES = (".txt", ".raw", ".jsonl", ".json")


def rows_of(path: Path) -> list[str]:
    """Rows of a file: one for each object of JSONL or JSON and each line of WikiText's ``.raw``; else the whole file.

    Raises:
        TextError: when the file is not UTF-8, or its rows have no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
        # Lines end at a newline alone: str.splitlines would also cut at Unicode's separators within a row.
        lines = io.StringIO(content)
        if path.suffix == ".jsonl":
            return [_text_of(json.loads(line)) for line in lines if line.strip()]
        if path.suffix == ".json":
            return [_text_of(row) for row in json.loads(content)]
        if path.suffix == ".raw":
            # The rows of the Hugging Face data set: an empty string for a blank line, else the line with its newline.
            return [line if line.strip() else "" for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f"{path} is not made of rows with a field 'text' in UTF-8 ({error!r}); convert it") from error
    return [content]


def _text_of(row: dict[str, str]) -> str:
    """The field `text`; of Alpaca's rows without one, instruction, input and output under one another."""
    if "text" not in row and "instruction" in row:
        parts = [row["instruction"], row.get("input", ""), row["output"]]
        return "\n".join(_string(part) for part in parts if part != "")
    return _string(row["text"])


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is {value!r}")
    return value
