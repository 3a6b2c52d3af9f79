"""What jsonargparse says of options and recipes, in one line: the setting, its value, and what was expected."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from kurtail_pl.cli.failures import UsageError, ours_in
from kurtail_pl.errors import REASON_LENGTH, shortened

KEY = re.compile(r'Parser key "([^"]+)"')
UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept o|Subcommand '\w+' does not accept o|O)ption '([^']+)'"
)
NO_MAPPING = "argument after ** must be a mapping"
"""Python says this of a value where jsonargparse takes settings for granted."""
LATE = re.compile(rf"{re.escape(NO_MAPPING)}, not (\w+)")
REFUSED = re.compile(r"\AD[^\n]*\n[^\n]*\nErrors:\n  - (?!Expected |Not a valid subclass |Problem with given)([^\n]+)")
"""Matches what a class said when it refused a value, where that class is the first of several types."""
UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<group>)--([\w.-]+)")
REQUIRED = re.compile(r"arguments are required: (.+)")
NO_MODULE = re.compile(r"No module named '([^']+)'")
NO_SETTINGS = re.compile(r"Unable to load config '([^']*)'")
NO_CLASS = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
OTHER_CLASS = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
EXPECTED = re.compile(
    r"(?:Expected an? (?P<type>.+?)|Not a valid subclass of (?P<kind>\w+))(?:\. Got value: (?P<value>.*))?$"
)
NO_NAME = re.compile(r"Expected a dot import path string: (\S+)")
SEAMS = {"rounder": "Rounder", "weights": "Format"}
"""These settings hold a method; its base class is in `kurtail_pl.methods`, which is imported only when it is needed."""
GIVEN = re.compile(r"Given value: (.*)")
PLAIN = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
    "dict": "settings", "NoneType": "null",
}  # fmt: skip
VALUE_LENGTH = 60
WRONG_SETTING = "Does not validate against any of the Union subtypes"
"""jsonargparse says this in many places when a value does not fit."""


class OneLine:
    """A parser whose errors are one line, and name the setting that a misspelled one is like."""

    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong; the parser of a class leaves it to the one that it stands in."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        message += _suggestion(message, [action.dest for action in parser._actions])
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(explained(message)) from None


class OneLineParser(OneLine, argparse.ArgumentParser):
    """Of options alone."""


class SettingsParser(OneLine, ArgumentParser):
    """Of the verbs that need no trainer."""


@contextmanager
def late_errors_explained() -> Iterator[None]:
    """Say what jsonargparse finds wrong only when it makes objects as it is said when parsing."""
    try:
        yield
    except (ValueError, TypeError) as error:
        late = any(said in str(error) for said in (WRONG_SETTING, NO_MAPPING))
        if not late or ours_in(error) is not None:
            raise
        raise UsageError(explained(str(error))) from error


def explained(message: str) -> str:
    """A message of jsonargparse, often many lines, in one short one."""
    place = ".".join(dict.fromkeys(key for key in KEY.findall(message) if key != "config"))
    start = f"{place}: " if place else ""
    if late := LATE.search(message):
        return f"{start}a value is {late[1]}, expected settings (name: value)"
    if refused := REFUSED.search(message):
        return f"{start}{shortened(refused[1], REASON_LENGTH)}"
    if unknown := UNKNOWN.search(message):
        group = f"{unknown['group']}." if unknown["group"] else ""
        return f"{start}there is no setting {group}{shortened(unknown[2], VALUE_LENGTH)}{_suggested(message)}"
    if missing := NO_CLASS.search(message):
        module, name = missing.groups()
        return f"{start}{module} has no {name}{_like(name, dir(importlib.import_module(module)))}"
    if required := REQUIRED.search(message):
        return f"{start}{required[1]} must be given; --help lists the settings"
    if module := NO_MODULE.search(message):
        return f"{start}there is no module {module[1]}; check the class_path"
    if text := NO_SETTINGS.search(message):
        return f"{place} is {shortened(text[1], VALUE_LENGTH)}, expected settings (name: value)"
    if other := OTHER_CLASS.search(message):
        return f"{start}{other[1]} is not a {other[2]}"
    seam = SEAMS.get(place.rpartition(".")[2])
    if seam is not None and (name := NO_NAME.search(message)):
        names = sorted(getattr(importlib.import_module("kurtail_pl.methods"), seam).kinds())
        shown = shortened(name[1], VALUE_LENGTH)
        return f"{place} is {shown}, expected one of {', '.join(names)}{_like(name[1].upper(), names)}"
    if unrecognized := UNRECOGNIZED.search(message):
        hint = _suggested(message) or "; --help lists the settings"
        return f"there is no setting {shortened(unrecognized[2], VALUE_LENGTH)}{hint}"
    return _type_error(message, place) or f"{start}{_plain(message)}; --help lists the settings"


def _type_error(message: str, place: str) -> str | None:
    """Of the innermost types that a value was held against; None where the message is of something else."""
    found = [(len(line) - len(line.lstrip(" -")), EXPECTED.search(line)) for line in message.splitlines()]
    matches = [(depth, match) for depth, match in found if match]
    if not matches:
        return None
    innermost = max(depth for depth, _ in matches)
    here = [match for depth, match in matches if depth == innermost]
    value = next((match["value"] for match in here if match["value"] is not None), None)
    if value is None:
        given = GIVEN.search(message, message.index(here[-1][0]))
        value = given[1] if given else ""
    value = value.removesuffix(".").split(". Got value: ")[0]
    choices = [
        choice for match in here for choice in re.findall(r"'([^']*)'", match["type"] or "") if "<" not in match[0]
    ]
    expected = " or ".join(dict.fromkeys(_named(match) for match in here))
    shown = shortened(value, VALUE_LENGTH) or repr(value)
    return f"{place or 'it'} is {shown}, expected {expected}{_like(value, choices)}"


def _named(match: re.Match[str]) -> str:
    """A type in words."""
    if match["kind"]:
        return f"a {match['kind']} (class_path and init_args)"
    text = match["type"]
    if text.startswith("dot import path"):
        return "a class path"
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {literal[1]}" if "," in literal[1] else literal[1]
    name = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    return PLAIN.get(name, name.rpartition(".")[2] if "[" not in name else name)


def _plain(message: str) -> str:
    """Any other message: its lines one after another, without the keys that stand before it."""
    lines = (KEY.sub("", line).strip(" -:") for line in message.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _like(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [each for each in known if not each.startswith("_")], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _suggestion(message: str, settings: list[str]) -> str:
    """The setting, of those that a parser has, that a misspelled one is like."""
    unknown = UNKNOWN.search(message) or UNRECOGNIZED.search(message)
    if unknown is None or "did you mean" in message:
        return ""
    group = f"{unknown['group']}." if unknown["group"] else ""
    before = ""
    for name in f"{group}{unknown[2]}".split("."):
        beside = {each.removeprefix(before).split(".")[0] for each in settings if each.startswith(before)}
        if name not in beside:
            return _like(name, beside)
        before += f"{name}."
    return ""


def _suggested(message: str) -> str:
    found = re.search(r"; did you mean .*?\?", message)
    return found[0] if found else ""
