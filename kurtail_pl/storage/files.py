"""Whole files or none: everything is written beside its place and renamed; hashes; room on the disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from kurtail_pl.errors import ArtefactError, DiskFull, NotFinite
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.transfer import to_cpu
from kurtail_pl.storage.writing import disk_errors_are_ours

RECENT_NS = 2_000_000_000
"""A file that was written this short ago might be written again within one tick of the clock that stamps it."""


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a hidden folder beside the wanted one, which takes the wanted one's name when the block ends well; when it
    does not, the hidden folder is removed and what stood there before still stands. Another process that makes the same
    folder is waited for.

    Raises:
        ArtefactError: when the folder exists and may not be overwritten.
        NotWritable: when the operating system does not let it be written; DiskFull when the disk is full.
    """
    folder = folder.resolve()
    with alone_with(folder), disk_errors_are_ours(folder):
        put_back(folder)
        refuse_existing(folder, overwrite)
        partial = folder.with_name(f".{folder.name}.partial")
        remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            remove(partial)
            raise
        put_in_place(partial, folder)


def put_in_place(partial: Path, folder: Path) -> None:
    """Let a finished folder take its name. What stood there is removed only after that."""
    old = _old(folder)
    if folder.exists():
        remove(old)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        put_back(folder)
        raise
    remove(old)


def put_back(folder: Path) -> None:
    """Mend what a process killed in `put_in_place` left: the old folder comes back unless the new one stands."""
    old = _old(folder)
    if folder.exists():
        remove(old)
    elif old.exists():
        old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def remove(folder: Path) -> None:
    """Remove a folder that KurTail wrote with all that is in it, if it is there; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise ArtefactError when a folder with content stands where one is to be written."""
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ArtefactError(f"{file} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ArtefactError(f"{folder} exists; pass --overwrite to replace it, or name another folder")


def refuse_finished(folder: Path, overwrite: bool) -> None:
    """`refuse_existing`, before anything is read; the lock goes of a process that was killed when all was done."""
    if folder.is_dir():
        with alone_with(folder):
            pass
    refuse_existing(folder, overwrite)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all.

    Yields the name to write to, which becomes the wanted one when the block ends well; else what is there is removed.

    Raises:
        NotWritable: when the operating system does not let it be written; DiskFull when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors_are_ours(path):
        temporary.unlink(missing_ok=True)  # A link would lead the writer out of the folder.
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON through a temporary name; raises NotFinite, naming the entry, for a number that is none."""
    entry = next(_not_finite(data), None)
    if entry is not None:
        raise NotFinite(f"{entry} of {path} would be nan or infinite; nothing was written")
    write_text(path, json.dumps(data, indent=2) + "\n")


def _not_finite(data: Any, name: str = "") -> Iterator[str]:
    """Names of the numbers in nested data that are infinite or none."""
    if isinstance(data, float) and not math.isfinite(data):
        yield name
    if isinstance(data, Mapping | list | tuple):
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))


def write_text(path: Path, text: str) -> None:
    """Write text through a temporary name."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None) -> None:
    """Write a safetensors file through a temporary name.

    The metadata (transformers wants ``format: pt`` for weights) has one key: several come out in a random order, and
    the file's hash would change from write to write.

    Raises:
        NotFinite: before anything is written, naming a tensor with a value that is infinite or not a number.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NotFinite(
                f"{name} of {path} would be nan or infinite; nothing was written: the model's values are too large "
                "for the computation, use another copy of it"
            )
    contiguous = {name: to_cpu(tensor) for name, tensor in tensors.items()}
    room = path.with_name(f".{path.name}.writing")
    with whole_file(path) as temporary:
        # safetensors writes under a random name beside the wanted one, which a kill would leave there for good.
        remove(room)
        room.mkdir()
        try:
            save_file(contiguous, room / path.name, metadata=dict([metadata or ("format", "pt")]))
            # It also lets nobody else read what it writes.
            (room / "usual").touch()
            shutil.copymode(room / "usual", room / path.name)
            (room / path.name).replace(temporary)
        finally:
            remove(room)


def claim(file: BinaryIO | FileIO, size: int) -> None:
    """Give an open file its size and the room for it; raises OSError when the disk has none."""
    file.truncate(size)
    if sys.platform == "linux":
        os.posix_fallocate(file.fileno(), 0, size)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; one that is asked for again and has not changed is not read again.

    Reading takes about a second for each gigabyte.
    """
    stat = path.stat()
    if time.time_ns() - stat.st_mtime_ns < RECENT_NS:
        return _digest(path)
    return _remembered_digest(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def sha256_of_each(paths: Sequence[Path]) -> dict[Path, str]:
    """`sha256_of` of several files, as many at a time as torch has threads: one alone reads slower than a disk."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(paths, pool.map(sha256_of, paths), strict=True))


@lru_cache(maxsize=1 << 16)
def _remembered_digest(path: Path, *state: int) -> str:
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raise DiskFull unless a folder's disk has room for that many bytes."""
    free = free_disk(folder)
    if free < needed:
        raise DiskFull(
            f"{folder} needs {gigabytes(needed)} and its disk has {gigabytes(free)} free; "
            "free some space, name another disk, or ask for fewer rows"
        )


def free_disk(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or will be."""
    parents = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(parent for parent in parents if parent.exists())).free


def gigabytes(size: float) -> str:
    """Bytes for people: ``1.25 GB``, ``12.5 MB`` below a tenth of a gigabyte."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def cache_folder() -> Path:
    """Where downloaded and converted models are kept: `$KURTAIL_CACHE`, else the user's cache folder."""
    own = os.environ.get("KURTAIL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "kurtail"
