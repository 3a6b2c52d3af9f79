"""What the operating system says when something cannot be written, as a NotWritable."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kurtail_pl.errors import DiskFull, KurtailError, NotWritable

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EFBIG)
"""These error numbers of the system are looked for in exceptions other than OSError."""
NUMBER = re.compile(r"\((?:os error )?(\d+)\)")
"""Matches the system's error number in what Rust's libraries (safetensors, tokenizers) and torch raise."""


@contextmanager
def disk_errors_are_ours(place: Path) -> Iterator[None]:
    """Turn what the operating system raises while a folder or file is written into DiskFull or NotWritable."""
    try:
        yield
    except KurtailError:
        raise
    except Exception as error:
        number = number_of(error)
        if number is None:
            raise  # No word of the system's: a library reports something else by it.
        raise _ours(place, number, getattr(error, "filename", None)) from error


def number_of(error: BaseException) -> int | None:
    """The system's number (`errno`) of what it refused; None when an exception is about something else."""
    if isinstance(error, OSError):
        return error.errno
    found = [int(number) for number in NUMBER.findall(str(error))]
    return next((number for number in found if number in REFUSED and os.strerror(number) in str(error)), None)


def _ours(place: Path, number: int, file: object) -> NotWritable:
    if number in FULL:
        return DiskFull(f"the disk is full while writing {place}; free some space and run it again")
    # Folders are removed file by file, by their last names.
    where = file if isinstance(file, str) and os.path.dirname(file) else place
    return NotWritable(
        f"{where} cannot be written: {os.strerror(number)}; correct that, or name another folder, and run it again"
    )
