"""`kurtail VERB ...`: find the verb, import what it needs, run it; what goes wrong becomes one line and a code."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from kurtail_pl import __version__
from kurtail_pl.cli.failures import BUG, TRACEBACK, USAGE, USER, failure

VERBS = {
    "recipes": ("kurtail_pl.cli.recipes:recipes", "List the recipes, with what each is for."),
    "plan": ("kurtail_pl.cli.plan:plan", "Print what each stage of a recipe takes, and what does not fit."),
    "fit": ("kurtail_pl.cli.trainer:fit", "Capture, learn rotations, fuse, quantize and evaluate, as a recipe says."),
    "validate": ("kurtail_pl.cli.trainer:validate", "Report the kurtosis of a checkpoint's rotations."),
    "compare": ("kurtail_pl.cli.compare:compare", "Run recipes, their baselines and seeds, and print one table."),
    "capture": ("kurtail_pl.cli.verbs:capture", "Run the model over text and store sampled activations."),
    "fuse": ("kurtail_pl.cli.verbs:fuse", "Fuse rotations, learned or random, into a model's weights."),
    "quantize": (
        "kurtail_pl.cli.verbs:quantize",
        "Quantize a fused model into an artefact folder.",
    ),
    "export": ("kurtail_pl.cli.onnx:export", "Write an ONNX model of an artefact folder, and check it."),
    "generate": ("kurtail_pl.cli.onnx:generate", "Continue a prompt by an export, printing the text as it comes."),
    "eval": ("kurtail_pl.cli.verbs:evaluate", "Measure perplexity or tasks of models or artefact folders."),
    "figures": ("kurtail_pl.cli.verbs:figures", "Draw the paper's figures from activations and rotations."),
    "report": ("kurtail_pl.cli.verbs:report", "Write an artefact's report and print the table of methods."),
}
"""Verb -> (function, first line of its docstring)."""


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; without one, print what there is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help"):
        print(_help())
        return
    if verb == "--version":
        print(f"kurtail {__version__}")
        return
    if verb not in VERBS:
        print(f"kurtail: no verb {verb!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(USAGE)
    _log_to_stderr()
    module, function = VERBS[verb][0].split(":")
    try:
        getattr(importlib.import_module(module), function)(rest)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into an exit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print(f"kurtail {verb}: interrupted; what was finished is kept", file=sys.stderr)
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
    for name in ("kurtail_pl", "kurtail_onnx"):
        log = logging.getLogger(name)
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def _help() -> str:
    lines = [f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: kurtail VERB [options]   (kurtail VERB --help shows a verb's options)",
            "",
            "4-bit weights, activations and KV cache through kurtosis-learned rotations.",
            "",
            *lines,
        ]
    )
