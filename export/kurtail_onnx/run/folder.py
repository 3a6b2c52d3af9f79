"""An export folder, as a runner needs it: its description, its sizes, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kurtail_onnx.describe import MODEL
from kurtail_pl.errors import ArtefactError
from kurtail_pl.stages.export import DESCRIPTION, FORMAT
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.records import fields_of, read_object, require_format, require_inside

AGAIN = "copy the folder again or export again"
PAST = "past_key_values."
NUMPY: dict[str, type[np.generic]] = {"int64": np.int64, "uint8": np.uint8}
NUMPY |= {"float": np.float32, "float16": np.float16, "double": np.float64}


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; dynamic dimensions are names."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int | str, ...]

    @property
    def type(self) -> str:
        """Its type as ONNX Runtime spells it, such as ``tensor(uint8)``."""
        return f"tensor({next(name for name, dtype in NUMPY.items() if dtype is self.dtype)})"


@dataclass(frozen=True)
class _Sizes:
    positions: int
    eos_token_ids: list[int]
    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True)
class _Input:
    name: str
    dtype: Literal["int64", "uint8", "float", "float16", "double"]
    shape: list[int | str]


@dataclass(frozen=True)
class _LongRope:
    border: int
    where: str


@dataclass(frozen=True)
class _Fields:
    """What a runner reads of a description."""

    model: _Sizes
    longrope: _LongRope | None
    inputs: list[_Input]
    sha256: dict[str, str]


class Export:
    """A folder that `kurtail export` wrote.

    Args:
        folder: where it is.

    Raises:
        ArtefactError: when it is none, was written by a newer version, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / DESCRIPTION
        if not file.is_file():
            raise ArtefactError(f"{folder} is not a KurTail export: it has no {DESCRIPTION}; run kurtail export")
        self.description = read_object(file, ArtefactError, AGAIN)
        require_format(self.description, FORMAT, file, ArtefactError)
        self._fields = fields_of(self.description, _Fields, file, ArtefactError, AGAIN)
        for name, expected in self._fields.sha256.items():
            require_inside(name, file, ArtefactError)
            path = folder / name
            if not path.is_file() or sha256_of(path) != expected:
                raise ArtefactError(f"{path} is missing or damaged; {AGAIN}")

    @property
    def model(self) -> Path:
        """The graph's file."""
        return self.folder / MODEL

    @property
    def positions(self) -> int:
        """The longest text, in tokens."""
        return self._fields.model.positions

    @property
    def rotary_border(self) -> int | None:
        """The longest text with the angles of short ones; None where all texts have the same angles."""
        longrope = self._fields.longrope
        return None if longrope is None else longrope.border

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(self._fields.model.eos_token_ids)

    @cached_property
    def cache_ports(self) -> list[Port]:
        """The inputs that hold the cache."""
        ports = (Port(i.name, NUMPY[i.dtype], tuple(i.shape)) for i in self._fields.inputs)
        return [port for port in ports if port.name.startswith(PAST)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        return tokenizer


def present_of(past: str) -> str:
    """Name of the output that a cache input's next content comes from."""
    return past.replace(PAST, "present.", 1)
