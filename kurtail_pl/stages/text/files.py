"""Rows of text in local files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kurtail_pl.errors import TextError, shortened
from kurtail_pl.storage.reading import Unreadable, json_lines, kind_of, parse_json, read_utf8

SUFFIXES = (".txt", ".raw", ".jsonl", ".ndjson", ".json")
OTHER_FORMATS = (
    *(".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".pdf", ".docx", ".html", ".htm", ".xml"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"),
)
"""What would be read as prose, markup and separators included, and is refused by its name."""


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read, in small letters."""
    return path.suffix.lower()


def rows_of(path: Path) -> list[str]:
    """Rows of a file: one for each object of JSONL or JSON and each line of WikiText's ``.raw``; else the whole file.

    Raises:
        TextError: when the file is of another format, cannot be read, is not UTF-8, or its rows have no text.
    """
    suffix = suffix_of(path)
    if suffix in OTHER_FORMATS:
        raise TextError(
            f"{path} is a {suffix} file, which is not read; convert it to JSON lines with a field 'text' (.jsonl) or "
            "to plain text (.txt)"
        )
    try:
        content = read_utf8(path)
        if suffix in (".jsonl", ".ndjson"):
            return [_text_of(row, f"line {number}") for number, row in json_lines(content)]
        if suffix == ".json":
            return [_text_of(row, f"row {number}") for number, row in _json_rows(content)]
        if suffix == ".raw":
            # The rows of the Hugging Face data set: an empty string for a blank line, else the line with its newline.
            return [line if line.strip() else "" for line in io.StringIO(content)]
        if "\0" in content:
            raise Unreadable(f"holds a zero byte in line {content.count(chr(10), 0, content.index(chr(0))) + 1}")
    except Unreadable as error:
        raise TextError(f"{path} {error}; {_expected(suffix)}") from error
    return [content]


def _expected(suffix: str) -> str:
    if suffix in (".jsonl", ".ndjson"):
        return "expected an object with a field 'text', or Alpaca's fields, in each line"
    if suffix == ".json":
        return (
            "expected one list of objects with a field 'text', or Alpaca's fields (one object in each line is .jsonl)"
        )
    return "expected plain text in UTF-8"


def _json_rows(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = parse_json(content)
    if not isinstance(rows, list):
        raise Unreadable(f"holds {kind_of(rows)}, not a list")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise Unreadable(f"row {number} is {kind_of(row)}")
        yield number, row


def _text_of(row: dict[str, Any], place: str) -> str:
    """The field `text`; of Alpaca's rows without one, instruction, input (where there is one) and output."""
    if "text" in row:
        return _string(row, "text", place)
    if "instruction" not in row or "output" not in row:
        names = ", ".join(repr(shortened(name, 20)) for name in list(row)[:4]) or "none"
        raise Unreadable(f"{place} has no field 'text' (its fields: {names}{', ...' if len(row) > 4 else ''})")
    given = [name for name in ("instruction", "input", "output") if row.get(name, "") != ""]
    return "\n".join(_string(row, name, place) for name in given if name != "input" or row[name] is not None)


def _string(row: dict[str, Any], name: str, place: str) -> str:
    """A field that is text, and text that UTF-8 can write: JSON can hold half of a pair of surrogates."""
    value = row[name]
    if not isinstance(value, str):
        raise Unreadable(f"{place} has {kind_of(value)} as its {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise Unreadable(f"{place} holds {half}, half of a character, in its {name!r}: mend or drop it") from None
    return value
