"""What a GGUF file says of itself: metadata and places of tensors; every length is checked before it is used."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from kurtail_pl.errors import CheckpointError
from kurtail_pl.storage.weights import POINTER

AGAIN = "copy or download the file again"
VERSIONS = (2, 3)
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
FOREIGN = (
    (POINTER, "is a pointer of git-lfs, not the model; run: git lfs pull"),
    (b"<", "is a web page, not the model; download the file itself"),
    (b"PK", "is a zip file, as PyTorch writes pickles; give a GGUF file or a folder with safetensors"),
    ((b"lmgg", b"fmgg", b"tjgg", b"ggml", b"ggjt"), "has the format before GGUF; convert the original model anew"),
)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: shape in torch's order, its type, first byte and number of bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def values(self, name: str) -> NDArray[np.float32]:
        """A tensor dequantized by the `gguf` package, in torch's shape, float32.

        Raises:
            CheckpointError: when the package cannot dequantize its type.
        """
        tensor = self.tensors[name]
        block, width = GGML_QUANT_SIZES[tensor.kind]
        stored = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.size,))
        rows = stored.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * width)
        try:
            found: NDArray[np.float32] = dequantize(rows, tensor.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path} stores {name} in {tensor.kind.name}, which the package gguf cannot dequantize; give "
                "another quantization of the model"
            ) from error
        return found.reshape(tensor.shape)


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensor table of a GGUF file.

    Raises:
        CheckpointError: when it is another kind of file, cut off, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if not start:
            raise CheckpointError(f"{path} is empty; {AGAIN}")
        for magic, what in FOREIGN:
            if start.startswith(magic):
                raise CheckpointError(f"{path} {what}")
        if not start.startswith(b"GGUF"):
            raise CheckpointError(f"{path} is not a GGUF file (it begins with {start[:4]!r}); check the path")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except struct.error as error:
                raise CheckpointError(f"{path} is cut off within its header; {AGAIN}") from error
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is damaged, a text in its header is not UTF-8; {AGAIN}") from error


class _Reader:
    """Reads a header from its beginning on; struct.error says that the file ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in VERSIONS:
            other = "is for big-endian machines" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise CheckpointError(
                f"{self.path} {other}; known: versions 2 and 3, little-endian; convert the model anew"
            )
        tensors, keys = self.number("<Q"), self.number("<Q")
        self.room(24 * tensors + 12 * keys)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in metadata:
                raise CheckpointError(f"{self.path} is damaged, it says {key!r} twice; {AGAIN}")
            metadata[key] = self.value(self.number("<I"))
        table = [(self.string(), *self.place()) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path} is damaged, its alignment is {alignment!r}; {AGAIN}")
        data = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in table:
            if name in found:
                raise CheckpointError(f"{self.path} is damaged, it has tensor {name!r} twice; {AGAIN}")
            found[name] = self.tensor(name, shape, kind, data + offset)
        return GgufHeader(self.path, metadata, found)

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        try:
            known = GGMLQuantizationType(kind)
            block, width = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} stores {name} in type {kind}, which the package gguf does not know; update it, or give "
                "another quantization of the model"
            ) from error
        if not shape or 0 in shape or shape[-1] % block:
            raise CheckpointError(f"{self.path} is damaged, {name} is {list(shape)} in blocks of {block}; {AGAIN}")
        size = prod(shape) // block * width
        if start + size > len(self.data):
            raise CheckpointError(
                f"{self.path} is cut off: {name} ends at byte {start + size}, the file at {len(self.data)}; {AGAIN}"
            )
        return GgufTensor(name, shape, known, start, size)

    def place(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self.number("<I")
        self.room(8 * dimensions)
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        return shape, self.number("<I"), self.number("<Q")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            self.room(count * (8 if inner == STRING else struct.calcsize(FORMATS.get(inner, "<B"))))
            if inner != ARRAY:
                return [self.value(inner) for _ in range(count)]
        elif kind in FORMATS:
            return self.number(FORMATS[kind])
        raise CheckpointError(f"{self.path} is damaged, a value in its header has type {kind}; {AGAIN}")

    def string(self) -> str:
        length = self.number("<Q")
        self.room(length)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def room(self, size: int) -> None:
        """Raise struct.error unless so many bytes are left."""
        if size > len(self.data) - self.at:
            raise struct.error
