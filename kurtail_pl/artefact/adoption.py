"""A model that transformers makes, fills and places, and that becomes quantized in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kurtail_pl.artefact.load import mark_loaded
from kurtail_pl.artefact.placement import require_range
from kurtail_pl.artefact.skeleton import equip
from kurtail_pl.errors import CheckpointError, ConfigError
from kurtail_pl.storage.card import require_intact
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.sources import completed
from kurtail_pl.surgery.equip import take_over
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.layout import module_name


class Adoption:
    """Equips the empty model; `finish` is called when transformers has read the weights into it.

    Args:
        model: of the configuration that was asked for, on device ``meta``; changed in place.
        folder: where its weights are.
        dtype: floating-point type of what is no code.

    Raises:
        ArtefactError: when the folder is not ours, or a file is missing or not the one that was written.
        CheckpointError: when the hub does not give a file, or the weights are not those of the model's configuration.
        ConfigError: when the model has no head.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
        if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise ConfigError(f"{type(model).__name__} has no head that gives logits; use AutoModelForCausalLM")
        self._folder = completed(folder, str(model.config.name_or_path))
        require_intact(self._folder)
        self.architecture = architecture_of(model.config)
        with _as_usual():
            take_over(model)
            equip(model, self._folder)
        model.to(dtype)  # type: ignore[arg-type]
        self._require_weights_of(model)
        self._computed = _apart(model)

    def _require_weights_of(self, model: PreTrainedModel) -> None:
        """For what is missing transformers would fill in random numbers."""
        found = {module_name(name, self.architecture) for name in Checkpoint(self._folder).names}
        if different := sorted(found ^ set(model.state_dict())):
            raise CheckpointError(
                f"the weights in {self._folder} do not fit the configuration at {different[0]}; leave that as it is"
            )

    def finish(self, model: PreTrainedModel) -> None:
        """Make a model what `load` gives; raises ConfigError when the type does not hold a weight."""
        for name, values in self._computed.items():
            model.get_buffer(name).copy_(values)
        require_range(model)
        model.requires_grad_(False)
        mark_loaded(model, self._folder)


@contextmanager
def _as_usual() -> Iterator[None]:
    """Tensors are made on the CPU and in float32, whatever transformers has set for its own modules."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _apart(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is no weight but computed, by name: factors of Hadamards, rotary frequencies.

    transformers makes an empty tensor for each on its device, and for one alone of those that modules share: here each
    module gets its own.
    """
    computed = dict(model.named_non_persistent_buffers(remove_duplicate=False))
    for name, buffer in computed.items():
        place, _, key = name.rpartition(".")
        setattr(model.get_submodule(place), key, buffer.clone())
    return computed
