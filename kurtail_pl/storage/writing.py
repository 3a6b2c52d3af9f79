"""What the operating system says when something cannot be written, as errors of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kurtail_pl.errors import DiskFull, NotWritable

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO)
"""What a SafetensorError is searched for: it has no number, only the system's words."""


@contextmanager
def disk_errors_are_ours(place: Path) -> Iterator[None]:
    """Turn what the operating system raises while a folder or file is written into DiskFull or NotWritable."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # No word of the system's: a library reports something else by it.
        raise _ours(place, error.errno, error.filename) from error
    except SafetensorError as error:
        number = next((number for number in REFUSED if os.strerror(number) in str(error)), None)
        if number is None:
            raise
        raise _ours(place, number, None) from error


def _ours(place: Path, number: int, file: object) -> NotWritable:
    if number in FULL:
        return DiskFull(f"the disk is full while writing {place}; free some space and run it again")
    where = f" ({file})" if isinstance(file, str) and file != str(place) else ""
    return NotWritable(
        f"{place} cannot be written{where}: {os.strerror(number)}; mend that, or name another folder, and run it again"
    )
