"""Load an artefact folder as a `transformers` model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kurtail_pl.artefact.placement import Place, device_of, dtype_of, spread
from kurtail_pl.artefact.skeleton import CPU, parts_of, skeleton, whole_model
from kurtail_pl.errors import ArtefactError, ConfigError
from kurtail_pl.storage.card import require_intact
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import new_folder
from kurtail_pl.storage.model_config import read_generation_config
from kurtail_pl.storage.sources import folder_of
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.packed_cache import keep_packed


def load(
    folder: str | Path,
    *,
    device: Place | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: Place | Mapping[str, Any] | None = None,
    cache: Literal["float", "packed"] = "float",
) -> PreTrainedModel:
    """Give back the quantized model of an artefact folder, ready for `forward` and `generate`.

    Weights stay packed in memory. On a CPU with VNNI, integers of inputs and weights that have one scale each are
    multiplied as they are, for which the codes are unpacked to a byte each at their first use. Elsewhere weights are
    dequantized whenever they are used (`kurtail_pl.surgery.equip.unpack_weights` does it once), and what is quantized
    on the fly, inputs, keys and values, stands as floats on its levels.
    As it comes, in float32 on the CPU, the logits of a window equal those that were evaluated, bit for bit, on the same
    machine. `save_pretrained` of an unchanged model copies its folder; of a changed one it raises ArtefactError.

    Args:
        folder: what `kurtail fit`, `quantize` or `fuse` wrote; a string may be a name on the Hugging Face hub too.
        device: where the model goes; the CPU by default.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of what is no code. Rotary frequencies, the factors of online
            Hadamards and the scales of weights keep their type, then and in a later `model.to(dtype)`.
        device_map: instead of a device, ``auto`` or a map from modules to devices, for `accelerate`.
        cache: what keys and values of earlier tokens are held as: ``float``, quantized whenever they are read, or
            ``packed``, as codes and scales, which for 4 bits take 0.29 of float16 in heads of 64, and 0.27 of 128.

    Returns:
        A model in evaluation mode. The tokenizer loads from the same folder with `transformers.AutoTokenizer`.

    Raises:
        ArtefactError: when the folder is not ours, incomplete or damaged.
        CheckpointError: when a file is missing, or the hub has none of that name.
        ConfigError: when the type or device cannot be had, the type does not hold the weights, or the artefact's cache
            has no packed form.
    """
    if cache not in ("float", "packed"):
        raise ConfigError(f"cache is {cache!r}; give float or packed")
    if device is not None and device_map is not None:
        raise ConfigError(f"device is {device!r} and device_map is {device_map!r}; give one of them")
    kind, where = dtype_of(dtype), CPU if device is None else device_of(device)
    path = folder.expanduser() if isinstance(folder, Path) else folder_of(folder)
    require_intact(path)
    model = whole_model(Checkpoint(path), kind, where)
    model.config.dtype = kind
    mark_loaded(model, path)
    model.generation_config = read_generation_config(path) or model.generation_config
    if device_map is not None:
        spread(model, device_map)
    if cache == "packed":
        architecture = architecture_of(model.config)
        keep_packed(model, [layer.get_submodule(architecture.attention) for layer in layers_of(model, architecture)])
    return model


class Loaded(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What `load` adds to the class of a model.

    Attributes:
        folder: where it came from.
    """

    folder: ClassVar[Path]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Copy the folder that the model came from, tokenizer, card and all, to a new one.

        transformers' own method would write what nothing loads. Its other options have no meaning here.

        Raises:
            ArtefactError: when the model is no longer what the folder holds, or the new folder is not empty.
        """
        target = Path(save_directory)
        if options.get("state_dict") is not None or options.get("push_to_hub"):
            raise ArtefactError(
                "save_pretrained copies the model's folder; upload it with huggingface_hub's upload_folder"
            )
        if not is_main_process or target.resolve() == self.folder:
            return
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArtefactError(f"{target} is not empty; name a new folder, and save the tokenizer after the model")
        require_intact(self.folder)
        if changed := _changed(self):
            raise ArtefactError(
                f"{changed} is not what {self.folder} holds, and only an unchanged model can be saved; load it again"
            )
        with new_folder(target, overwrite=False) as partial:
            shutil.copytree(self.folder, partial, dirs_exist_ok=True)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *options: Any, **named: Any) -> None:
        """Refuse another attention: it would leave out R3 and the quantizers of the cache, without a word.

        Raises:
            ConfigError: for any but the model's own.
        """
        if attn_implementation != ATTENTION:
            raise ConfigError(
                f"attn_implementation is {attn_implementation!r}; this model rotates and quantizes keys and values, as "
                f"only {ATTENTION!r} does: leave it as it is"
            )


def mark_loaded(model: PreTrainedModel, folder: Path) -> None:
    """Let a model know the folder that it came from, by a class of its own under the old name."""
    model.__class__ = type(type(model).__name__, (Loaded, type(model)), {"folder": folder.resolve()})


def _changed(model: Loaded) -> str | None:
    """Name of the first module or tensor that differs from what `load` made of its folder; None for none."""
    checkpoint = Checkpoint(model.folder)
    fresh = skeleton(checkpoint)
    wanted, found = (dict[str, nn.Module](m.named_modules()) for m in (fresh, model))
    name: str
    for name in {**wanted, **found}:
        module, other = wanted.get(name), found.get(name)
        if module is None or other is None or _settings(module) != _settings(other):
            return name
    for name, tensors in parts_of(checkpoint, fresh):
        state = model.get_submodule(name).state_dict()
        for key in {**tensors, **state}:
            if key not in tensors or key not in state or not _equal(tensors[key], state[key]):
                return f"{name}.{key}"
    return None


def _settings(module: nn.Module) -> list[object]:
    """What own modules have beside tensors."""
    return [getattr(module, name, None) for name in ("activations", "weights", "side", "cache")]


def _equal(stored: Tensor, loaded: Tensor) -> bool:
    return stored.shape == loaded.shape and torch.equal(stored.to(loaded.dtype), loaded.cpu())
