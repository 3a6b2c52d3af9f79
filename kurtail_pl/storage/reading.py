"""Text and JSON that others wrote, read so that what is wrong with it becomes one short sentence."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kurtail_pl.errors import shortened


class Unreadable(ValueError):
    """A file is not what it should be; the message says how, without the file's name and the remedy."""


def read_utf8(path: Path) -> str:
    r"""A text file, without the mark that some editors begin it with; each way to end a line becomes ``\n``.

    Raises:
        Unreadable: when it is missing, may not be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or type(error).__name__})") from error
    if data.startswith(b"\x1f\x8b"):
        raise Unreadable("is compressed by gzip: unpack it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start} (0x{data[error.start]:02x}, in line {line})"
        raise Unreadable(f"is not UTF-8 at {where}: convert it to UTF-8") from None  # It carries all the bytes.
    return io.StringIO(text.removeprefix(codecs.BOM_UTF8.decode()), newline=None).read()


def parse_json(text: str) -> Any:
    """JSON from memory; raises Unreadable where it is damaged or nested too deeply for Python."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not JSON ({shortened(str(error), 70)})") from error


def json_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON Lines, each with the number of its line; empty lines are passed over.

    Raises:
        Unreadable: naming the line that is no JSON object.
    """
    # Lines end at a newline alone: str.splitlines would also cut at Unicode's separators within a row.
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except Unreadable as error:
            raise Unreadable(f"line {number} {error}") from error
        if not isinstance(row, dict):
            raise Unreadable(f"line {number} holds {kind_of(row)}, expected an object")
        yield number, row


def kind_of(value: object) -> str:
    """A JSON value's kind in words, for messages."""
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "a string"), (list, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")
