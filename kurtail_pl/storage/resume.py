"""Work that goes on where it stopped: a hidden folder beside the wanted one, and a record of what is finished."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kurtail_pl.errors import DiskFull, KurtailError, ResumeMismatch
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.storage.files import cache_folder, refuse_existing, sha256_of_text, write_json

log = logging.getLogger(__name__)

UNFINISHED, PROGRESS = "unfinished", "progress.json"


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
        # Each process has the hidden states of its own windows: another number of them cannot go on.
        self._recipe: dict[str, Any] = json.loads(json.dumps({**recipe, "processes": ranks.size}))

    def resume(self) -> list[str]:
        """Take up the record in the folder, if any; returns the differences that forbid it."""
        if not self._record.is_file():
            return []
        record = json.loads(self._record.read_text(encoding="utf-8"))
        found = differences(record["recipe"], self._recipe)
        if not found:
            self.done, self.state = record["done"], record["state"]
            log.info("going on after %d finished parts in %s", self.done, self.folder)
        return found

    def finished(self, layers: int) -> None:
        """Record that so many layers are finished, by every process, and all their files written."""
        self._ranks.barrier()
        if self._ranks.leads:
            write_json(self._record, {"recipe": self._recipe, "done": layers, "state": self.state})
        # Nobody writes over the states before this layer while the record says that it is to be done.
        self._ranks.barrier()
        self.done = layers


@contextmanager
def resumable_folder(
    folder: Path, overwrite: bool, recipe: Mapping[str, Any], ranks: Ranks = ALONE
) -> Iterator[Workplace]:
    """A folder that appears whole, and whose making can be killed and taken up again.

    Yields the workplace, a hidden folder beside the wanted one, which takes the wanted one's name when the block ends
    well. A block that is killed, interrupted, or runs out of disk leaves it; the next call with the same recipe goes on
    there. After any other error of the user's it is removed.

    Args:
        folder: the wanted folder.
        overwrite: replace the wanted folder, and unfinished work of another recipe.
        recipe: all that decides the result.
        ranks: the processes that make it together; only the first may write to it, but for its `scratch`.

    Raises:
        ArtefactError: when the folder exists and may not be overwritten.
        ResumeMismatch: when unfinished work of another recipe stands there, naming the differences.
        DiskFull: when the disk is full; what was finished is kept.
    """
    refuse_existing(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    with _unfinished(partial, recipe, overwrite, ranks) as work:
        yield work
    ranks.barrier()
    if ranks.leads:
        shutil.rmtree(partial / UNFINISHED)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    ranks.barrier()


@contextmanager
def resumable_work(recipe: Mapping[str, Any]) -> Iterator[Workplace]:
    """A workplace in the cache folder for work that leaves no folder; removed when the block ends well.

    Args:
        recipe: all that decides the result; work of another recipe has another place.

    Raises:
        DiskFull: when the disk is full; what was finished is kept.
    """
    folder = cache_folder() / "work" / sha256_of_text(json.dumps(recipe, sort_keys=True))[:16]
    with _unfinished(folder, recipe, overwrite=True) as work:
        yield work
    shutil.rmtree(folder)


@contextmanager
def _unfinished(folder: Path, recipe: Mapping[str, Any], overwrite: bool, ranks: Ranks = ALONE) -> Iterator[Workplace]:
    work = Workplace(folder, recipe, ranks)
    found = work.resume()
    if found and not overwrite:
        raise ResumeMismatch(
            f"{folder} holds unfinished work with other settings: {'; '.join(found)}; "
            "run it with those, or remove that folder"
        )
    ranks.barrier()  # All have read the record.
    if work.done is None and ranks.leads:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    work.scratch.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_is_ours(folder):
            yield work
    except DiskFull:
        raise
    except KurtailError:
        if ranks.leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def full_disk_is_ours(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk raises into DiskFull."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno == errno.ENOSPC if isinstance(error, OSError) else "No space left" in str(error)
        if not full:
            raise
        raise DiskFull(f"the disk is full while writing {folder}; free some space and run it again") from error


def differences(have: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings, each as ``key is A, wanted B``."""
    found = []
    for key in sorted({*have, *wanted}):
        one, other = have.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key} is {one!r}, wanted {other!r}")
    return found
