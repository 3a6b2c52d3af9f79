"""JSON files, read back: what they hold is checked once, here, and nothing else of them is trusted."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, ValidationError

from kurtail_pl.errors import KurtailError, shortened
from kurtail_pl.methods.method import adapter_of

T = TypeVar("T")
LONGEST_NAME = 255
"""A file's name has at most this many bytes on every file system that is in use."""
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
"""pydantic gives the error that an entry is missing these names."""
Number = Annotated[float, Field(gt=-1e300, lt=1e300)]
"""JSON has whole numbers of any length, and no float is that large."""
OTHERS_TOO = ConfigDict(strict=True, extra="ignore")
"""The pydantic configuration of dataclasses that describe only part of what a file holds."""


def read_object(path: Path, wrong: type[KurtailError], remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        wrong: the error of a file that cannot be read, or holds something else.
        remedy: what to do then; the end of its message.
    """
    try:
        # Text cut within a character, numbers of thousands of digits and lists in lists in lists are no JSON for us.
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise wrong(f"{path} is not JSON ({shortened(str(error), 70)}); {remedy}") from error
    if not isinstance(value, dict):
        raise wrong(f"{path} holds {shortened(repr(value), 40)}, expected a JSON object; {remedy}")
    return value


def require_format(data: Mapping[str, Any], expected: int, path: Path, wrong: type[KurtailError]) -> None:
    """Raise `wrong` when a file has the format of another version."""
    found = data.get("format")
    if found != expected:
        raise wrong(
            f"{path} has format {shortened(repr(found), 40)}, expected {expected}; make it again with this version"
        )


def fields_of(data: object, kind: type[T], path: Path, wrong: type[KurtailError], remedy: str) -> T:
    """An object's fields as a dataclass, those that are dataclasses too.

    Args:
        data: what `read_object` gave, or a part of it.
        kind: the dataclass; its types are strict. Other fields are refused, but not in itself, nor in what has the
            configuration `OTHERS_TOO`.
        path: the file.
        wrong: the error that names the field, its value and what was expected.
        remedy: what to do then; the end of its message.
    """
    if not isinstance(data, dict):
        raise wrong(f"{path} holds {shortened(repr(data), 40)} where an object should be; {remedy}")
    known = {name: data[name] for name in kind.__dataclass_fields__ if name in data}  # type: ignore[attr-defined]
    try:
        return cast(T, adapter_of(cast(Hashable, kind)).validate_json(json.dumps([known]))[0])
    except ValidationError as error:
        first = error.errors()[0]
        place = shortened(".".join(map(str, first["loc"][1:])), 40)
        if first["type"] in MISSING:
            raise wrong(f"{path} has no {place}; {remedy}") from error
        found, expected = shortened(repr(first["input"]), 40), shortened(first["msg"].removeprefix("Value error, "), 80)
        raise wrong(f"{path}: {place} is {found}: {expected}; {remedy}") from error


def require_inside(name: str, path: Path, wrong: type[KurtailError]) -> None:
    """Raise `wrong` unless a file's name, as a file says it, stays in the folder of that file."""
    parts = PurePosixPath(name)
    too_long = any(len(part.encode()) > LONGEST_NAME for part in parts.parts)
    if (
        parts.is_absolute()
        or ".." in parts.parts
        or not parts.parts
        or not name.isprintable()
        or "\\" in name
        or too_long
    ):
        shown = shortened(repr(name), 40)
        raise wrong(f"{path} names the file {shown}, which is not in its folder; get the folder from its source")
