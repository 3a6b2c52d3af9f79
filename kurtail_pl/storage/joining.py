"""Weights in many safetensors files, joined into files as the Hugging Face hub has them.

Bytes are copied from file to file, as the format lets one: a length of 8 bytes, a JSON header, and the bytes of tensor
after tensor. So nothing of a model is held in memory, and equal parts give equal files. A part that is large enough to
be a file of its own is not copied: it gets a second name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import BinaryIO

from kurtail_pl.storage.files import claim, whole_file, write_json
from kurtail_pl.storage.weights import INDEX, SINGLE

LARGEST = 5_000_000_000
"""Bytes of tensors in a file; the hub's own limit for what is previewed and cached well."""
WHOLE = 500_000_000
"""A part of so many bytes or more stays a file."""
CHUNK = 1 << 24
METADATA = "__metadata__"


@dataclass(frozen=True)
class Piece:
    """A tensor's bytes in a file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.size // max(1, prod(self.shape))


def join(parts: Sequence[Path], folder: Path, largest: int = LARGEST) -> None:
    """Write a model's weights out of files that hold some of them each.

    They become `model.safetensors`, or where that would be too large numbered files and their index. The parts stay. It
    may be done again after it was killed, and writes the same.

    Args:
        parts: safetensors files, in the order of the model.
        folder: where the weights go.
        largest: bytes of tensors in a file, unless one tensor is larger.

    Raises:
        NotWritable: when the operating system does not let it be written; DiskFull when the disk is full.
    """
    held = [pieces_of(part) for part in parts]
    shards = _split(held, largest)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        if shard in held:
            _name(folder / name, shard[0].path)
        else:
            # Large numbers first, so that each begins at a multiple of its size, which readers of mapped files need.
            _write(folder / name, sorted(shard, key=lambda piece: -piece.itemsize))
    if count > 1:
        weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        size = sum(piece.size for shard in shards for piece in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def pieces_of(path: Path) -> list[Piece]:
    """The tensors of a safetensors file, in their order, from its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop(METADATA, None)
    pieces = [
        Piece(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    ]
    return sorted(pieces, key=lambda piece: piece.start)


def room_for(sizes: Iterable[int]) -> int:
    """Bytes that parts of these sizes and the files joined from them take together."""
    return sum(size if _stays(size, LARGEST) else 2 * size for size in sizes)


def _stays(size: int, largest: int) -> bool:
    return WHOLE <= size <= largest


def _split(parts: Sequence[Sequence[Piece]], largest: int) -> list[list[Piece]]:
    """Fill one file after another; a part that stays is one."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for part in parts:
        stays = _stays(sum(piece.size for piece in part), largest)
        for number, piece in enumerate(part):
            begins = number == 0 if stays else size + piece.size > largest
            if shards[-1] and begins:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece.size
        if stays:
            size = largest
    return [shard for shard in shards if shard]


def _name(path: Path, part: Path) -> None:
    """Let a part have a second name; where a disk knows no such thing, it is copied."""
    with whole_file(path) as temporary:
        try:
            temporary.hardlink_to(part)
        except OSError:
            shutil.copyfile(part, temporary)


def _write(path: Path, pieces: Sequence[Piece]) -> None:
    ends = list(accumulate(piece.size for piece in pieces))
    entries = {
        piece.name: {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": (end - piece.size, end)}
        for piece, end in zip(pieces, ends, strict=True)
    }
    header = json.dumps({METADATA: {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        claim(file, 8 + len(header) + ends[-1])
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            for chunk in _chunks(piece):
                file.write(chunk)


def _chunks(piece: Piece) -> Iterator[bytes]:
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        left = piece.size
        while left:
            chunk = _read(file, min(left, CHUNK))
            left -= len(chunk)
            yield chunk


def _read(file: BinaryIO, size: int) -> bytes:
    chunk = file.read(size)
    assert chunk, f"{file.name} ends before its header says"  # We wrote it.
    return chunk
