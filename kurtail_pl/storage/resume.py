"""Work that goes on where it stopped: a hidden folder beside the wanted one, and a record of what is finished."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_pl.errors import KurtailError, NotWritable, ResumeMismatch, listed, shortened
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.storage.files import (
    cache_folder,
    put_back,
    put_in_place,
    refuse_existing,
    remove,
    sha256_of_text,
    write_json,
)
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.records import fields_of, read_object
from kurtail_pl.storage.writing import disk_errors_are_ours

log = logging.getLogger(__name__)

UNFINISHED, PROGRESS = "unfinished", "progress.json"
HASH = "_sha256"
"""Keys that hold hashes end in this."""


@dataclass(frozen=True)
class _Record:
    """What a record of unfinished work holds."""

    recipe: dict[str, Any]
    processes: int
    done: int | None
    state: dict[str, Any]


class Workplace:
    """An unfinished folder.

    Args:
        folder: the hidden folder; `scratch` is a folder in it for what is not part of the result, each process's own.
        recipe: all that decides the result, as plain data for JSON.
        ranks: the processes that work here together; all of them see the folder, and the first keeps the record.

    Attributes:
        done: finished decoder layers; None before the hidden states of the first are there.
        state: what the stage wants to remember beside its files; it changes it in place.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.folder, self.scratch = folder, folder / UNFINISHED / f"rank{ranks.rank}"
        self.done: int | None = None
        self.state: dict[str, Any] = {}
        self._ranks, self._record = ranks, folder / UNFINISHED / PROGRESS
        self._recipe: dict[str, Any] = json.loads(json.dumps(recipe))

    def resume(self) -> list[str]:
        """Take up the record in the folder, if any; returns the differences that forbid it."""
        if not self._record.is_file() or self.folder.is_symlink():  # Ours is no link.
            return []
        try:
            data = read_object(self._record, ResumeMismatch, "")
            record = fields_of(data, _Record, self._record, ResumeMismatch, "")
        except ResumeMismatch:
            return [f"its record {self._record.name} is damaged"]
        found = differences(record.recipe, self._recipe)
        if found:
            return found
        if record.processes != self._ranks.size:
            # Each process has the hidden states of its own windows: another number of them cannot go on.
            log.info(
                "%s was begun by %d processes, these are %d: it is begun anew",
                self.folder,
                record.processes,
                self._ranks.size,
            )
            return []
        self.done, self.state = record.done, record.state
        log.info("going on after %d finished parts in %s", self.done, self.folder)
        return []

    def finished(self, layers: int) -> None:
        """Record that so many layers are finished, by every process, and all their files written."""
        self._ranks.barrier()
        if self._ranks.leads:
            record = {"recipe": self._recipe, "processes": self._ranks.size, "done": layers, "state": self.state}
            write_json(self._record, record)
        # Nobody writes over the states before this layer while the record says that it is to be done.
        self._ranks.barrier()
        self.done = layers


@contextmanager
def resumable_folder(
    folder: Path, overwrite: bool, recipe: Mapping[str, Any], ranks: Ranks = ALONE
) -> Iterator[Workplace]:
    """A folder that appears whole, and whose making can be killed and taken up again.

    Yields the workplace, a hidden folder beside the wanted one, which takes the wanted one's name when the block ends
    well. A block that is killed, interrupted, or cannot write leaves it; the next call with the same recipe goes on
    there. After any other error of the user's it is removed. Another process that makes the same folder is waited for.

    Args:
        folder: the wanted folder.
        overwrite: replace the wanted folder, and unfinished work of another recipe.
        recipe: all that decides the result.
        ranks: the processes that make it together; only the first may write to it, but for its `scratch`.

    Raises:
        ArtefactError: when the folder exists and may not be overwritten.
        ResumeMismatch: when unfinished work of another recipe stands there, naming the differences.
        NotWritable: when the operating system does not let it be written, DiskFull when the disk is full; what was
            finished is kept.
    """
    folder = folder.resolve()
    with alone_with(folder, ranks):
        if ranks.leads:
            put_back(folder)
        ranks.barrier()
        refuse_existing(folder, overwrite)
        partial = folder.with_name(f".{folder.name}.partial")
        with _unfinished(partial, recipe, overwrite, ranks) as work:
            yield work
        ranks.barrier()
        if ranks.leads:
            with disk_errors_are_ours(folder):
                shutil.rmtree(partial / UNFINISHED)
                put_in_place(partial, folder)


@contextmanager
def resumable_work(recipe: Mapping[str, Any]) -> Iterator[Workplace]:
    """A workplace in the cache folder for work that leaves no folder; removed when the block ends well.

    Args:
        recipe: all that decides the result; work of another recipe has another place.

    Raises:
        NotWritable: when the operating system does not let it be written; what was finished is kept.
    """
    folder = cache_folder() / "work" / sha256_of_text(json.dumps(recipe, sort_keys=True))[:32]
    with alone_with(folder):
        with _unfinished(folder, recipe, overwrite=True) as work:
            yield work
        remove(folder)


@contextmanager
def _unfinished(folder: Path, recipe: Mapping[str, Any], overwrite: bool, ranks: Ranks = ALONE) -> Iterator[Workplace]:
    work = Workplace(folder, recipe, ranks)
    found = work.resume()
    if found and not overwrite:
        raise ResumeMismatch(
            f"{folder} holds other unfinished work: {listed(found)}; finish that, pass --overwrite, or remove it"
        )
    ranks.barrier()  # All have read the record.
    try:
        with disk_errors_are_ours(folder):
            if work.done is None and ranks.leads:
                remove(folder)
            ranks.barrier()
            work.scratch.mkdir(parents=True, exist_ok=True)
            yield work
    except NotWritable:
        raise
    except KurtailError:
        if ranks.leads:
            remove(folder)
        raise


def differences(have: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings, each as ``key is A, wanted B``; a hash says only that it differs."""
    found = []
    for key in sorted({*have, *wanted}):
        one, other = have.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other and key.endswith(HASH):
            found.append(f"another {shortened(prefix + key.removesuffix(HASH).replace('_', ' '), 60)}")
        elif one != other:
            found.append(
                f"{shortened(prefix + key, 60)} is {shortened(repr(one), 40)}, wanted {shortened(repr(other), 40)}"
            )
    return found
