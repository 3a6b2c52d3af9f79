"""An export folder, as a runner needs it: its description, its sizes, its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kurtail_onnx.describe import DESCRIPTION, FORMAT, MODEL
from kurtail_pl.errors import ArtefactError
from kurtail_pl.storage.files import sha256_of

NUMPY: dict[str, type[np.generic]] = {"int64": np.int64, "uint8": np.uint8}
NUMPY |= {"float": np.float32, "float16": np.float16, "double": np.float64}


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; dynamic dimensions are names."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int | str, ...]


class Export:
    """A folder that `kurtail export` wrote.

    Args:
        folder: where it is.

    Raises:
        ArtefactError: when it is none, was written by a newer version, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ArtefactError(
                f"{folder} is no export of ours: {DESCRIPTION} cannot be read ({error}); make one with kurtail export"
            ) from error
        if self.description.get("format") != FORMAT:
            raise ArtefactError(
                f"{folder} has format {self.description.get('format')}, expected {FORMAT}; export again"
            )
        for name, expected in self.description["sha256"].items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != expected:
                raise ArtefactError(f"{path} is missing or damaged; copy the folder again or export again")

    @property
    def model(self) -> Path:
        """The graph's file."""
        return self.folder / MODEL

    @property
    def positions(self) -> int:
        """The longest text, in tokens."""
        return int(self.description["model"]["positions"])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(self.description["model"]["eos_token_ids"])

    @cached_property
    def cache_ports(self) -> list[Port]:
        """The inputs that hold the cache."""
        return [port for port in map(_port, self.description["inputs"]) if port.name.startswith("past_key_values.")]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer


def _port(value: dict[str, Any]) -> Port:
    return Port(value["name"], NUMPY[value["dtype"]], tuple(value["shape"]))


def present_of(past: str) -> str:
    """Name of the output that a cache input's next content comes from."""
    return past.replace("past_key_values.", "present.", 1)
