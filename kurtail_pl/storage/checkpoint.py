"""A folder in the Hugging Face layout, read tensor by tensor: config, safetensors shards, tokenizer."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from kurtail_pl.errors import CheckpointError
from kurtail_pl.storage.files import sha256_of, sha256_of_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """Lazy view of a model folder; only the names of its tensors are read at once.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with an index.

    Raises:
        CheckpointError: when the folder, its configuration or its weights are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist; give a folder with config.json and weights")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; give a model folder in the Hugging Face layout")
        for path in self.files:
            if not path.is_file():
                raise CheckpointError(f"weight file {path} is missing; copy or download the model again")
        self._file_of = self._open_files()

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'} cannot be used ({error}); copy the model again"
            ) from error
        return config

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        if (self.folder / INDEX).is_file():
            try:
                index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
                return [self.folder / name for name in sorted(set(index["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self.folder / INDEX} is damaged ({error!r}); copy the model again") from error
        return [self.folder / SINGLE]

    def _open_files(self) -> dict[str, Path]:
        """Name of each tensor -> its file; safetensors compares a file's length with its header."""
        found: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    found.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); copy or download the model again") from error
        return found

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; raises CheckpointError when the folder has none of that name."""
        with safe_open(self._file_holding(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor, from its file's header; raises CheckpointError as `tensor` does."""
        with safe_open(self._file_holding(name), framework="pt") as file:
            dtype: torch.dtype = file.get_slice(name)[:0].dtype
            return dtype

    def _file_holding(self, name: str) -> Path:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; the weights do not belong to its config.json")
        return self._file_of[name]

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of a module, by their names within it."""
        start = f"{prefix}."
        return {name.removeprefix(start): self.tensor(name) for name in self._file_of if name.startswith(start)}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder; raises CheckpointError when there is none."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} has no usable tokenizer ({error}); add its tokenizer.json") from error
        return tokenizer

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def sha256(self) -> str:
        """Hash of configuration and weights."""
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *self.files):
            digest.update(sha256_of(path).encode())
        return digest.hexdigest()

    def tokenizer_sha256(self) -> str:
        """Hash of what the tokenizer does: its fast representation, which holds vocabulary, merges and rules."""
        backend = getattr(self.tokenizer(), "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(f"{self.folder} has only a slow tokenizer; convert it to tokenizer.json")
        return sha256_of_text(backend.to_str())


def to_float(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; integer ones (packed codes) stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
