"""`kurtail VERB ...`: find the verb, import what it needs, run it; what goes wrong becomes one line and a code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path

from kurtail_pl import __version__
from kurtail_pl.cli.failures import BUG, TRACEBACK, USAGE, USER, failure, interrupted

COMMANDS = {
    "recipes": "kurtail_pl.cli.recipes:recipes",
    "plan": "kurtail_pl.cli.plan:plan",
    "fit": "kurtail_pl.cli.trainer:fit",
    "validate": "kurtail_pl.cli.trainer:validate",
    "compare": "kurtail_pl.cli.compare:compare",
    "demo": "kurtail_pl.cli.demo:demo",
    "export": "kurtail_pl.cli.export:export",
    "inspect": "kurtail_pl.cli.inspect:inspect",
    "completion": "kurtail_pl.cli.completion:completion",
}
"""Verbs whose functions take the arguments as they were typed."""
FUNCTIONS = {
    "capture": "kurtail_pl.cli.verbs:capture",
    "fuse": "kurtail_pl.cli.verbs:fuse",
    "quantize": "kurtail_pl.cli.verbs:quantize",
    "generate": "kurtail_pl.cli.onnx:generate",
    "eval": "kurtail_pl.cli.verbs:evaluate",
    "figures": "kurtail_pl.cli.verbs:figures",
    "report": "kurtail_pl.cli.verbs:report",
}
"""Verbs whose functions have a parameter for each option."""
VERBS = {**COMMANDS, **FUNCTIONS}


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; without one, print what there is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help"):
        print(main_help())
        return
    if verb == "--version":
        print(f"kurtail {__version__}")
        return
    if verb not in VERBS:
        print(f"kurtail: no verb {verb!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(USAGE)
    _log_to_stderr()
    _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> None:
    """Run a verb; exit with its code where it fails."""
    module, name = VERBS[verb].split(":")
    try:
        function = getattr(importlib.import_module(module), name)
        if verb in FUNCTIONS:
            importlib.import_module("kurtail_pl.cli.signature").run(verb, function, arguments)
        else:
            function(arguments)
    except (KeyboardInterrupt, SystemExit) as error:
        if not interrupted(error):
            raise
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        print(f"kurtail {verb}: {said or 'interrupted; what was finished is kept'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Who reads what is printed has gone, as `head` does: nothing is to be said, nor flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(USER)
    except Exception as error:
        line, code = failure(f"kurtail {verb}", error)
        if code == BUG and os.environ.get(TRACEBACK):
            raise
        print(line, file=sys.stderr)
        sys.exit(code)


def _log_to_stderr() -> None:
    """Our own log lines only: Lightning brings its own handler."""
    log = logging.getLogger("kurtail_pl")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


def main_help() -> str:
    """What `kurtail --help` prints."""
    lines = [f"  {verb:<12}{sentence(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "usage: kurtail VERB [options]   (kurtail VERB --help shows a verb's options)",
            "",
            "4-bit weights, activations and KV cache through kurtosis-learned rotations.",
            "",
            *lines,
        ]
    )


def sentence(verb: str) -> str:
    """First line of its function's docstring, from the source: importing it would bring torch."""
    module, function = VERBS[verb].split(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    body = ast.parse(Path(found.origin).read_text(encoding="utf-8")).body
    (definition,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    return (ast.get_docstring(definition) or "").partition("\n")[0]
