"""A folder in the Hugging Face layout, read tensor by tensor: config, safetensors shards, tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kurtail_pl.errors import CheckpointError, shortened
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.storage.files import sha256_of_each, sha256_of_text
from kurtail_pl.storage.mark import CARD, require_card, without_mark
from kurtail_pl.storage.model_config import read_config
from kurtail_pl.storage.parameters import placed, require_held
from kurtail_pl.storage.tokenizer import read_tokenizer
from kurtail_pl.storage.weights import Stored, refuse_quantized, stored_tensors, usual_files, weight_files
from kurtail_pl.surgery.positions import positions_of

DIFFERENCE_LENGTH = 80
"""A message spends at most this many characters on how weights differ from what a module has."""


class Checkpoint:
    """Lazy view of a model folder; only the headers of its files are read at once.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with an index.

    Raises:
        CheckpointError: when the folder, its configuration or its weights are missing or damaged, or quantized already.
        ArtefactError: when it is a KurTail artefact without its card.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            what = "is a file" if folder.is_file() else "does not exist"
            raise CheckpointError(f"model folder {folder} {what}; give a folder with config.json and weights")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; give a model folder in the Hugging Face layout")
        require_card(folder)
        if not self._ours:
            refuse_quantized(folder)
        self._stored = stored_tensors(self.files)

    @property
    def _ours(self) -> bool:
        return (self.folder / CARD).is_file()

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; raises CheckpointError when it asks for more than the weights hold."""
        config = without_mark(read_config(self.folder))
        require_held(self.folder, self._stored, config)
        return config

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return usual_files(self.folder) if self._ours else weight_files(self.folder)

    @cached_property
    def _places(self) -> dict[str, Stored]:
        return self._stored if self._ours else placed(self.folder, self._stored, self.config)

    @property
    def positions(self) -> int:
        """The longest text that the model is made for, in tokens."""
        return positions_of(self.config)

    def require_complete(self) -> None:
        """Raise CheckpointError unless the folder holds all weights that its configuration asks for, as `names`."""
        _ = self._places

    @property
    def names(self) -> list[str]:
        """Names of all tensors that the model needs, a tied head's included.

        Raises:
            CheckpointError: when one is missing, or does not fit the configuration.
        """
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; raises CheckpointError when the folder has none of that name, or values are no numbers."""
        place = self._place_of(name)
        with safe_open(place.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(place.name)
        if not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{place.path} has {bad} of {tensor.numel()} values of {place.name} that are nan or infinite; a "
                "training that diverged or a bad conversion gives such weights: use another copy of the model"
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor, from its file's header; raises CheckpointError as `tensor` does."""
        place = self._place_of(name)
        with safe_open(place.path, framework="pt") as file:
            dtype: torch.dtype = file.get_slice(place.name)[:0].dtype
            return dtype

    def _place_of(self, name: str) -> Stored:
        if name not in self._places:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; the weights do not belong to its config.json")
        return self._places[name]

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of a module, by their names within it."""
        start = f"{prefix}."
        return {name.removeprefix(start): self.tensor(name) for name in self._places if name.startswith(start)}

    def fill(self, module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of a module's own; raises CheckpointError when they are others than it has."""
        try:
            module.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            # Its first line says as much as an own message would.
            different = shortened(str(error).splitlines()[-1].strip(), DIFFERENCE_LENGTH)
            raise CheckpointError(
                f"the weights in {self.folder} do not fit its config.json and card at {prefix}: {different}; "
                "put files of one model together"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder; raises CheckpointError when there is none that goes with the model."""
        return read_tokenizer(self.folder, self.config.vocab_size)

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def sha256(self) -> str:
        """Hash of configuration and weights."""
        digest = hashlib.sha256()
        for sha256 in sha256_of_each([self.folder / "config.json", *self.files]).values():
            digest.update(sha256.encode())
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
