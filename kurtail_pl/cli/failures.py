"""What the terminal says when a verb does not end well: one line, and an exit code."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path
from typing import NamedTuple

from kurtail_pl.errors import KurtailError, reason

LINE_LENGTH = 300
"""A message has at most this many characters."""
USER, USAGE, BUG = 1, 2, 70
"""Exit codes: a file, a setting or the machine is at fault; the options or the recipe cannot be understood; a bug."""
TRACEBACK = "KURTAIL_TRACEBACK"
"""When this environment variable is set, a bug prints its traceback."""

REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions or name another place",
    errno.EPERM: "change its permissions or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some space and run it again",
    errno.EMFILE: "let processes open more files (ulimit -n)",
    errno.ENFILE: "close other programs: the whole machine has too many files open",
}
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)
OS_ERROR_IN_RUST = re.compile(r"\(os error (\d+)\)")


class UsageError(KurtailError):
    """Options or a recipe cannot be understood."""


class Failure(NamedTuple):
    """What is printed, and the exit code."""

    line: str
    code: int


def failure(program: str, error: Exception) -> Failure:
    """What to say of an exception."""
    ours = ours_in(error)
    if ours is not None:
        return Failure(_one_line(program, str(ours)), USAGE if isinstance(ours, UsageError) else USER)
    known = _of_the_system(error) or _of_memory(error) or _of_lightning(error)
    if known is not None:
        return Failure(_one_line(program, known), USER)
    text = f"this is a bug: {type(error).__name__} in {_place(error)} ({reason(error)})"
    return Failure(_one_line(program, f"{text}; {TRACEBACK}=1 shows all of it; please report it"), BUG)


def interrupted(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, which Lightning turns into an exit."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def ours_in(error: BaseException | None) -> KurtailError | None:
    """The KurtailError that an exception is, or that jsonargparse has wrapped in a ValueError."""
    while error is not None and not isinstance(error, KurtailError):
        error = (error.__cause__ or error.__context__) if isinstance(error, ValueError) else None
    return error


def _of_the_system(error: Exception) -> str | None:
    """What the operating system refused, and for which file."""
    number = error.errno if isinstance(error, OSError) else None
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    in_rust = OS_ERROR_IN_RUST.search(str(error))  # safetensors and tokenizers have exceptions of their own.
    if number is None and in_rust is not None:
        number = int(in_rust[1])
    if number is None:
        return None
    what = os.strerror(number)
    remedy = REMEDIES.get(number, "")
    shown = "" if path is None else str(path)
    if len(shown) > LINE_LENGTH // 2:
        shown = f"...{shown[-LINE_LENGTH // 2 :]}"
    return f"{shown}{': ' if shown else ''}{what}{'; ' if remedy else ''}{remedy}"


def _of_memory(error: Exception) -> str | None:
    exhausted = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)))
    if not exhausted:
        return None
    return f"out of memory ({reason(error)}); ask for fewer or shorter windows; kurtail plan says what a recipe takes"


def _of_lightning(error: Exception) -> str | None:
    """What Lightning says of settings that it cannot use."""
    if type(error).__name__ != "MisconfigurationException":
        return None
    return f"{reason(error)}; correct the trainer in the recipe"


def _place(error: Exception) -> str:
    """The last line of this project that an exception went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        package = next((name for name in parts if name.startswith("kurtail_")), None)
        if package is not None:
            inside = parts[len(parts) - parts[::-1].index(package) :]
            return f"{'/'.join(inside)} line {frame.lineno}"
    return "a library"


def _one_line(program: str, message: str) -> str:
    """A message on one line; where it is too long, its middle is left out: it ends with what to do."""
    line = f"{program}: {' '.join(message.split(chr(10)))}"
    if len(line) <= LINE_LENGTH:
        return line
    start, found, end = line.rpartition("; ")
    end = f"{found}{end}" if len(end) < LINE_LENGTH // 2 else ""
    return f"{start[: LINE_LENGTH - 3 - len(end)]}...{end}"
