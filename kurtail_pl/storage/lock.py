"""One owner for each piece of work: whoever comes second waits, and says for whom."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.storage.writing import disk_errors_are_ours

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def alone_with(place: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Hold the lock of a folder or file that is to be written, until the block ends.

    While another process holds it, on this machine or on another that shares the file system, this one waits, and a log
    line says for whom. The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends. A
    process that holds it already may take it again.

    Args:
        place: what is to be written; the lock is a hidden file beside it, which is removed at the end.
        ranks: the processes that do the work together: the first one holds the lock for all of them.

    Raises:
        NotWritable: when no file can be made beside the place.
    """
    place = place.resolve()
    if ranks.leads:
        with _held(place.with_name(f".{place.name}.lock"), place):
            ranks.barrier()
            yield
            ranks.barrier()
    else:
        ranks.barrier()
        yield
        ranks.barrier()


@contextmanager
def _held(path: Path, place: Path) -> Iterator[None]:
    with disk_errors_are_ours(place):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for %s, which works on %s", _owner(path), place)
            lock.acquire(poll_interval=SECONDS_BETWEEN_LOOKS)
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            with disk_errors_are_ours(place):
                path.write_text(json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": _now()}))
        yield
    finally:
        if outermost:
            # While it is still held: whoever waits for a removed file finds that out, and takes a new one.
            # Where it cannot be removed, it locks no one: the lock is the kernel's.
            with suppress(OSError):
                path.unlink()
        lock.release()


def _owner(path: Path) -> str:
    """Who holds a lock, as far as it has said so."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['machine']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")
