"""What jsonargparse says of options and recipes, in one line: the setting, its value, and what was expected."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
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
SEAMS = {
    "rounder": "Rounder", "weights": "Format", "cache": "CacheFormat", "clips": "ClipTuner", "bits": "BitTuner",
    "matching": "WeightTuner", "transforms": "TransformTuner", "side": "Side",
}  # fmt: skip
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
    for pattern, say in SAYINGS:
        if (found := pattern.search(message)) and (said := say(found, place)):
            return said
    return _type_error(message, place) or f"{_at(place)}{_plain(message)}; --help lists the settings"


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _unknown(found: re.Match[str], place: str) -> str:
    group = f"{found['group']}." if found["group"] else ""
    return f"{_at(place)}there is no setting {group}{shortened(found[2], VALUE_LENGTH)}{_suggested(found.string)}"


def _unrecognized(found: re.Match[str], _: str) -> str:
    hint = _suggested(found.string) or "; --help lists the settings"
    return f"there is no setting {shortened(found[2], VALUE_LENGTH)}{hint}"


def _no_class(found: re.Match[str], place: str) -> str:
    module, name = found.groups()
    return f"{_at(place)}{module} has no {name}{_like(name, dir(importlib.import_module(module)))}"


def _no_method(found: re.Match[str], place: str) -> str | None:
    """Of a name where a method is expected; None where another class is."""
    seam = SEAMS.get(place.rpartition(".")[2])
    if seam is None:
        return None
    names = sorted(getattr(importlib.import_module("kurtail_pl.methods"), seam).kinds())
    shown = shortened(found[1], VALUE_LENGTH)
    return f"{place} is {shown}, expected one of {', '.join(names)}{_like(found[1], names)}"


SAYINGS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], str | None]], ...] = (
    (LATE, lambda found, place: f"{_at(place)}a value is {found[1]}, expected settings (name: value)"),
    (REFUSED, lambda found, place: _at(place) + shortened(found[1], REASON_LENGTH)),
    (UNKNOWN, _unknown),
    (NO_CLASS, _no_class),
    (REQUIRED, lambda found, place: f"{_at(place)}{found[1]} must be given; --help lists the settings"),
    (NO_MODULE, lambda found, place: f"{_at(place)}there is no module {found[1]}; check the class_path"),
    (
        NO_SETTINGS,
        lambda found, place: f"{place} is {shortened(found[1], VALUE_LENGTH)}, expected settings (name: value)",
    ),
    (OTHER_CLASS, lambda found, place: f"{_at(place)}{found[1]} is not a {found[2]}"),
    (NO_NAME, _no_method),
    (UNRECOGNIZED, _unrecognized),
)
"""What is said of a message that a pattern matches, by the setting's place; the first that says anything decides."""


def _type_error(message: str, place: str) -> str | None:
    """Of the innermost types that a value was held against; None where the message is of something else."""
    here = _innermost(message)
    if not here:
        return None
    value = _given(here, message)
    choices = [
        choice for match in here for choice in re.findall(r"'([^']*)'", match["type"] or "") if "<" not in match[0]
    ]
    expected = " or ".join(dict.fromkeys(_named(match) for match in here))
    shown = shortened(value, VALUE_LENGTH) or repr(value)
    return f"{place or 'it'} is {shown}, expected {expected}{_like(value, choices)}"


def _innermost(message: str) -> list[re.Match[str]]:
    """What stands deepest of the types that a value was held against."""
    found = [(len(line) - len(line.lstrip(" -")), EXPECTED.search(line)) for line in message.splitlines()]
    innermost = max((depth for depth, match in found if match), default=0)
    return [match for depth, match in found if match and depth == innermost]


def _given(matches: list[re.Match[str]], message: str) -> str:
    """The value that was held against some types: it stands with one of them, or after them."""
    value = next((match["value"] for match in matches if match["value"] is not None), None)
    if value is None:
        given = GIVEN.search(message, message.index(matches[-1][0]))
        value = given[1] if given else ""
    return value.removesuffix(".").split(". Got value: ")[0]


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
    names = [each for each in known if not each.startswith("_")]
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name, names, n=1)
    close = close or [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1)]
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
