"""Options of a verb from the signature of its function, their help from its docstring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args, get_origin, get_type_hints

from jsonargparse import auto_cli

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.usage import SettingsParser, late_errors_explained


def run(verb: str, function: Callable[..., None], arguments: list[str]) -> None:
    """Call a function with what is given for its parameters.

    Args:
        verb: name of the verb, for usage.
        function: each parameter is an option; one that takes a list may be repeated.
        arguments: as typed.
    """
    with late_errors_explained():
        auto_cli(
            function,
            args=prepared(list(_lists_grown(function, arguments))),
            as_positional=False,
            parser_class=SettingsParser,
            prog=f"kurtail {verb}",
        )


def _lists_grown(function: Callable[..., None], arguments: list[str]) -> Iterator[str]:
    """Options of lists as ``--name+``: jsonargparse then adds to the list instead of replacing it."""
    lists = {
        f"--{name}"
        for name, hint in get_type_hints(function).items()
        if any(get_origin(kind) is list for kind in (hint, *get_args(hint)))
    }
    for argument in arguments:
        name, equals, value = argument.partition("=")
        yield f"{name}+{equals}{value}" if name in lists else argument
