"""Which files hold a model's weights, and which tensors they store.

The precedence is transformers' own and is decided here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kurtail_pl.errors import CheckpointError, reason, shortened
from kurtail_pl.storage.records import fields_of, read_object, require_inside

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

AGAIN = "copy that file from its source"
CONVERT = "convert it by transformers' from_pretrained and save_pretrained"
WITHOUT_WEIGHTS = (
    ("adapter_*", "is an adapter; merge it into its model by peft's merge_and_unload, save that and give its folder"),
    ("pytorch_model*.bin*", f"is a pickle, which is never loaded; {CONVERT}"),
    ("consolidated*", f"has the layout of the model's maker; {CONVERT}, or get the files that transformers reads"),
    ("model-*-of-*.safetensors", f"is a shard without its index; add {INDEX}"),
    ("model.*.safetensors*", f"is a variant; name it {SINGLE}, or {INDEX} where it is an index"),
    ("*.gguf", "is a GGUF file; give the file itself"),
    ("*.safetensors", f"has a name of its own; name it {SINGLE} if it holds the whole model"),
    ("*.bin", f"is a pickle, which is never loaded; {CONVERT}"),
    ("*.pt*", f"is a pickle, which is never loaded; {CONVERT}"),
    (f"*/{SINGLE}*", "lies in a folder within; give a folder that has config.json and the weights side by side"),
)
"""What may lie in a folder that has no weights where transformers looks for them, and what to do about it."""

POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file, its name there, shape and safetensors' name of its type."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Index:
    """What is read of an index: tensor -> file."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, sorted.

    They are what the configuration names (`transformers_weights`), else the single file, else those of the index.

    Raises:
        CheckpointError: when there are none, the index is damaged, or it names a file that is not there.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder / 'adapter_config.json'} {WITHOUT_WEIGHTS[0][1]}")
    named = _config(folder).get("transformers_weights")
    return usual_files(folder) if named is None else _named(folder, str(named))


def usual_files(folder: Path) -> list[Path]:
    """The single file, else those of the index, sorted; raises CheckpointError as `weight_files` does."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    return shards(folder, INDEX)


def _named(folder: Path, name: str) -> list[Path]:
    require_inside(name, folder / "config.json", CheckpointError)
    if not name.endswith((".safetensors", ".safetensors.index.json")) or not (folder / name).is_file():
        raise CheckpointError(
            f"{folder / 'config.json'} says transformers_weights: {shortened(repr(name), 40)}, which is not a "
            "safetensors file or an index of them; name one that is there, or take the setting away"
        )
    return [folder / name] if name.endswith(".safetensors") else shards(folder, name)


def shards(folder: Path, index_name: str = INDEX) -> list[Path]:
    """The files that an index names, sorted.

    Raises:
        CheckpointError: when the index is damaged, or names a file that is not there.
    """
    index = folder / index_name
    weight_map = fields_of(read_object(index, CheckpointError, AGAIN), _Index, index, CheckpointError, AGAIN).weight_map
    names = sorted(set(weight_map.values()))
    for name in names:
        require_inside(name, index, CheckpointError)
        if not (folder / name).is_file():
            shown = shortened(name, 80)
            raise CheckpointError(f"weight file {folder}/{shown} is missing, {index_name} names it; add that file")
    if not names:
        raise CheckpointError(f"{index} names no files; {AGAIN}")
    return [folder / name for name in names]


def _no_weights(folder: Path) -> CheckpointError:
    for pattern, what in WITHOUT_WEIGHTS:
        if found := min(folder.glob(pattern), default=None):
            return CheckpointError(f"{folder} has no {SINGLE}; {found.relative_to(folder)} {what}")
    return CheckpointError(
        f"{folder} has no weights: {SINGLE} is missing, and there are no shards with {INDEX}; add them to the folder"
    )


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of some files by their names there; of two with one name, the last file's, as in transformers.

    Raises:
        CheckpointError: when a file is damaged; safetensors compares its length with its header.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({reason(error)}); check its permissions") from error
        except SafetensorError as error:
            if is_pointer(path):
                raise CheckpointError(f"{path} is a pointer of git-lfs, not the weights; run: git lfs pull") from error
            raise CheckpointError(
                f"{path} is damaged or cut off ({reason(error)}); copy or download that file again"
            ) from error
    return found


def is_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in the place of a large one that git-lfs has not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_quantized(folder: Path) -> None:
    """Raise CheckpointError when a folder's configuration says that its weights are quantized already."""
    config = _config(folder)
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        method = found.get("quant_method", "compressed-tensors") if isinstance(found, dict) else found
        raise CheckpointError(
            f"{folder} is already quantized by {str(method)[:40]} (quantization_config in its config.json); "
            "give the original float model"
        )


def _config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds; nothing where it is damaged, which whoever reads it for its settings says."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
