"""The activation store: sampled rows of every site of a model, one file a site, and a manifest.

A *site* is a place in the model: `layer007.attn_in` and `layer007.ffn_in` (the residual stream where an attention or
MLP block reads it, or what its norm makes of that where R1 is online, `[rows, hidden]`) and `layer007.value`
(`[rows, kv_heads * head_dim]`). Rows are shuffled when written, so that training reads contiguous blocks.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kurtail_pl.errors import NotFinite, StoreMismatch, listed, reason
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.storage.files import claim, sha256_of_each, write_json
from kurtail_pl.storage.records import fields_of, read_object, require_format
from kurtail_pl.storage.resume import differences

FORMAT = 1
MANIFEST, COST = "manifest.json", "cost.json"
BYTES_PER_VALUE = 2
"""Rows are kept in bfloat16."""


@dataclass(frozen=True)
class Origin:
    """What a store was made from; two stores of equal origin hold equal rows."""

    model: str
    model_sha256: str
    tokenizer_sha256: str
    text: str
    text_sha256: str
    windows: int
    seqlen: int
    rows: int
    seed: int
    bos: bool = False
    """Whether each window begins with BOS."""
    dtype: str = "float32"
    """The floating-point type in which the model was run."""
    values: Literal["projected", "attended"] = "projected"
    """Values as `v_proj` gives them, or as the attention mixed them for each query head."""

    @property
    def key(self) -> dict[str, Any]:
        """What decides the rows; not how model and text were named."""
        return {name: value for name, value in asdict(self).items() if name not in ("model", "text")}


@dataclass(frozen=True)
class Shape:
    """Sizes of a store."""

    layers: int
    hidden_size: int
    kv_heads: int
    """The number of value heads; attended values have as many as the queries."""
    head_dim: int

    def width(self, site: str) -> int:
        """Channels of one site's rows."""
        return self.kv_heads * self.head_dim if site.endswith("value") else self.hidden_size


def block_sites(layers: int) -> list[str]:
    """The block inputs in the model's order: attention and MLP of each layer."""
    return [f"layer{layer:03d}.{block}" for layer in range(layers) for block in ("attn_in", "ffn_in")]


def value_sites(layers: int) -> list[str]:
    """The value projections' outputs."""
    return [f"layer{layer:03d}.value" for layer in range(layers)]


def store_bytes(shape: Shape, rows: int) -> int:
    """Bytes that a store takes."""
    sites = block_sites(shape.layers) + value_sites(shape.layers)
    return sum(shape.width(site) * rows * BYTES_PER_VALUE for site in sites)


class SiteWriter:
    """Writes one site's rows, ``[rows, width]`` in bfloat16, in any order; none of them stays in memory.

    A row goes to its place in the file at once, not through a memory map: pages of a map count as the process's own.
    Each goes by itself: rows are shuffled, and those of one window seldom stand side by side (one in as many as there
    are windows).

    Args:
        folder: of the store.
        site: whose rows.
        rows: how many there will be.
        width: channels.

    Raises:
        OSError: when the disk has no room for all of them.
    """

    def __init__(self, folder: Path, site: str, rows: int, width: int) -> None:
        self._bytes = width * BYTES_PER_VALUE
        entry = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, rows * self._bytes]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "rows": entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._handle = _file(folder, site).open("wb", buffering=0)
        self._handle.write(len(header).to_bytes(8, "little") + header)
        claim(self._handle, self._start + rows * self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def write(self, places: Tensor, rows: Tensor) -> None:
        """Put rows, ``[n, width]`` bfloat16, to their places, ``[n]``; raises NotFinite when a value is none."""
        if not is_finite(rows):
            raise NotFinite(
                f"rows of {self._handle.name} would be nan or infinite; the model's values are too large: use another "
                "copy of it"
            )
        for place, row in zip(places.tolist(), rows.view(torch.uint16).numpy(), strict=True):
            if os.pwrite(self._handle.fileno(), row, self._start + place * self._bytes) < self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._handle.name)


def write_manifest(folder: Path, origin: Origin, shape: Shape, versions: dict[str, str]) -> None:
    """Write the manifest, last of all: a folder without one is no store."""
    sites = block_sites(shape.layers) + value_sites(shape.layers)
    manifest = {
        "format": FORMAT,
        "origin": asdict(origin),
        "shape": asdict(shape),
        "versions": versions,
        "sha256": {path.stem: sha256 for path, sha256 in sha256_of_each([_file(folder, s) for s in sites]).items()},
    }
    write_json(folder / MANIFEST, manifest)


AGAIN = "copy the store again, or remove it to capture again"


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds beside its format; hashes by site."""

    origin: Origin
    shape: Shape
    versions: dict[str, str]
    sha256: dict[str, str]


class ActivationStore:
    """An existing store; rows are read when asked for.

    Args:
        folder: where it is.

    Raises:
        StoreMismatch: when there is no store, its format is unknown, or its manifest is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise StoreMismatch(f"{folder} is not an activation store: it has no {MANIFEST}; run kurtail capture first")
        data = read_object(path, StoreMismatch, AGAIN)
        require_format(data, FORMAT, path, StoreMismatch)
        manifest = fields_of(data, Manifest, path, StoreMismatch, AGAIN)
        self.origin, self.shape, self._sha256 = manifest.origin, manifest.shape, manifest.sha256
        # Counted first: the names of a store that claims to have a billion layers would fill the memory.
        layers = self.shape.layers
        if len(self._sha256) != 3 * layers or {*self._sha256} != {*block_sites(layers), *value_sites(layers)}:
            raise StoreMismatch(f"{path} lists other sites than a store of {layers} layers has; {AGAIN}")

    def require_origin(self, wanted: Origin) -> None:
        """Raise StoreMismatch, naming each difference, unless the store was made from what is wanted."""
        found = differences(self.origin.key, wanted.key)
        if found:
            raise StoreMismatch(
                f"store {self.folder} was made from something else: {listed(found)}; "
                "name another store folder, or remove this one to capture again"
            )

    def require_intact(self) -> None:
        """Raise StoreMismatch when a file's hash is not the manifest's."""
        expected = {_file(self.folder, site): sha256 for site, sha256 in self._sha256.items()}
        bad = next((path for path in expected if not path.is_file()), None)
        if bad is None:
            found = sha256_of_each([*expected])
            bad = next((path for path in expected if found[path] != expected[path]), None)
        if bad is not None:
            raise StoreMismatch(f"{bad} is missing or damaged; remove {self.folder} and capture again")

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """A block of one site's rows, ``[stop - start, width]``, float32."""
        return self.stored(site, start, stop).float()

    def stored(self, site: str, start: int, stop: int) -> Tensor:
        """The same in bfloat16, as they are stored."""
        path = _file(self.folder, site)
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice("rows")
                if stored.get_dtype() != "BF16" or stored.get_shape() != [self.origin.rows, self.shape.width(site)]:
                    raise StoreMismatch(f"{path} holds other rows than the manifest beside it says; {AGAIN}")
                rows: Tensor = stored[start:stop]
                return rows
        except (SafetensorError, OSError) as error:
            raise StoreMismatch(f"{path} cannot be read ({reason(error)}); {AGAIN}") from error


def _file(folder: Path, site: str) -> Path:
    return folder / f"{site}.safetensors"
