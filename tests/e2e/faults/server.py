"""A process that has imported everything and runs `kurtail` in forked children; one JSON line asks, one answers.

Importing takes seconds, a command on a tiny model less than one: so hundreds can be tried. A request is a list of
commands that run at once. Each has `arguments`, `folder` and `threads`; its messages go to the files `out` and `error`
(standard error). Its calls that change files `below` a folder are counted, written to the file `trace`, and with `at`
one is made to fail, or the process killed there or `delay` microseconds after (preload.c). `after` starts a command
when the first has made so many calls. The answer lists exit code, calls, hits, and the first call that was hit.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

MODULES = (
    *("kurtail_pl.cli.verbs", "kurtail_pl.cli.trainer", "kurtail_pl.cli.compare", "kurtail_pl.cli.export"),
    *("kurtail_onnx.write", "kurtail_onnx.verify.check", "lm_eval"),
)

ALL_KINDS = 15
Command = dict[str, Any]


class Faults:
    """The loaded library; every command has a slot of its own in memory that all processes share."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faults_where.restype = ctypes.c_char_p
        self._library.faults_count.restype = ctypes.c_long
        self._library.faults_hits.restype = ctypes.c_long

    def clear(self, slot: int) -> None:
        self._library.faults_clear(slot)

    def arm(self, slot: int, command: Command) -> None:
        at, delay = (ctypes.c_long(command.get(name, 0)) for name in ("at", "delay"))
        below, error, kinds = command["below"].encode(), command.get("errno", 0), command.get("kinds", ALL_KINDS)
        self._library.faults_arm(slot, below, error, kinds, at, command.get("once", False), delay)

    def trace(self, path: str) -> None:
        self._library.faults_trace(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))

    def count(self, slot: int) -> int:
        count: int = self._library.faults_count(slot)
        return count

    def hits(self, slot: int) -> int:
        hits: int = self._library.faults_hits(slot)
        return hits

    def where(self, slot: int) -> str:
        where: bytes = self._library.faults_where(slot)
        return where.decode(errors="replace")


def run(command: Command, slot: int, faults: Faults) -> NoReturn:
    """Become the command."""
    import torch

    from kurtail_pl.cli.main import main

    for stream, name in ((sys.stdout, "out"), (sys.stderr, "error")):
        stream.flush()
        file = os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(command["folder"])
    os.environ.update(command.get("environment", {}))
    torch.set_num_threads(command.get("threads", 1))
    sys.argv = ["kurtail"]
    if "trace" in command:
        faults.trace(command["trace"])
    faults.arm(slot, command)
    code: object = 0
    try:
        main(command["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, without taking apart all modules, which takes longer than the command.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def serve() -> None:
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # An extra that is not installed.
            sys.stderr.write(f"{name}: {error}\n")
    answers, faults = os.fdopen(os.dup(1), "w"), Faults()
    gc.freeze()  # Children then copy fewer pages.
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        commands: list[Command] = json.loads(line)
        children: list[int] = []
        for slot, command in enumerate(commands):
            faults.clear(slot)
            while faults.count(0) < command.get("after", 0) and not has_ended(children[0]):
                time.sleep(0.0005)
            child = os.fork()
            if child == 0:
                run(command, slot, faults)
            children.append(child)
        found = []
        for slot, child in enumerate(children):
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            found.append(
                {"code": code, "calls": faults.count(slot), "hits": faults.hits(slot), "where": faults.where(slot)}
            )
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def has_ended(child: int) -> bool:
    """Whether a child has ended; it can be waited for afterwards all the same."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    serve()
