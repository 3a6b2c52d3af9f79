"""Which files hold a model's weights, and which stored tensor fills which parameter.

The precedence is transformers' own and is decided here and nowhere else. What transformers would fill with random
numbers, or leave out although the model's own modules hold it, is refused.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from kurtail_pl.errors import CheckpointError, reason, shortened
from kurtail_pl.storage.records import fields_of, read_object, require_inside
from kurtail_pl.surgery.equip import empty_model, layers_of
from kurtail_pl.surgery.families import REGISTRY, architecture_of
from kurtail_pl.surgery.layout import module_name, stacked

log = logging.getLogger(__name__)

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

FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
"""Old checkpoints hold the rotary frequencies, which follow from the configuration."""
CACHE_SCALES = re.compile(r"\.self_attn\.([qkv]|prob|[kv]_proj\.output)_scale$")
"""Scales of a runtime's own 8-bit cache; the model itself has none."""
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|input_scale|weight_(packed|shape|g_idx|zero_point|scale\w*)"
    r"|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
)
ADAPTER = re.compile(r"\.(lora_\w+|base_layer)\.")
POINTER = b"version https://git-lfs"
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


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


def placed(folder: Path, stored: Mapping[str, Stored], config: PretrainedConfig) -> dict[str, Stored]:
    """Every tensor that a plain model needs, by its name there, and where it is stored.

    transformers' rule: a name may lack the prefix of the base model or have it once too often; a tied embedding and
    head that are both stored are each their own, and of which one is stored is both; what the model does not know is
    left out with a warning. Names within a decoder layer stay the checkpoint's, for `module_state`.

    Args:
        folder: for messages.
        stored: what the files hold.
        config: of the model.

    Raises:
        CheckpointError: naming a tensor that is missing, stored twice, of another shape, or of integers, or one that
            the model's own modules do not have.
        UnsupportedArchitecture: when the family is unknown.
    """
    architecture, shapes = architecture_of(config), _shapes(config)
    base = architecture.embedding.partition(".")[0] + "."
    found: dict[str, Stored] = {}
    filled: dict[str, Stored] = {}
    unknown: dict[str, str] = {}
    for name, tensor in stored.items():
        place, ours = name, module_name(name, architecture)
        if ours.startswith(base) and ours.removeprefix(base) in shapes:
            place, ours = name.removeprefix(base), ours.removeprefix(base)
        elif base + ours in shapes:
            place, ours = base + name, base + ours
        if ours not in shapes:
            unknown[ours] = name
            continue
        shape, parts = shapes[ours]
        _require_fits(folder, tensor, shape)
        for part in parts:
            if part in filled:
                raise CheckpointError(f"{folder} stores {part} twice, as {filled[part].name} and {name}; remove one")
            filled[part] = tensor
        found[place] = tensor
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    if config.tie_word_embeddings:
        for one, other in ((head, embedding), (embedding, head)):
            if one not in filled and other in filled:
                found[one] = filled[one] = filled[other]
    missing = [part for _, parts in shapes.values() for part in parts if part not in filled]
    if missing:
        raise _incomplete(folder, missing, unknown, head, config)
    layers = (f"{architecture.layers}.{index}" for index in range(config.num_hidden_layers))
    modules = (architecture.embedding, architecture.final_norm, architecture.head, *layers)
    _judge(folder, unknown, tuple(f"{module}." for module in modules), config)
    return found


def require_held(folder: Path, stored: Mapping[str, Stored], config: PretrainedConfig) -> None:
    """Raise CheckpointError when a configuration asks for more than the files hold; before modules are made for it.

    Every layer has norms as wide as the model, and a mixture's router a row for each expert.
    """
    layers, width = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    record, experts = REGISTRY.get(config.model_type), 1
    if record is not None and record.experts is not None:
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    held = sum(prod(tensor.shape) for tensor in stored.values())
    if layers * width * experts > held:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for {layers} layers {width} wide ({experts} experts), and the files hold "
            f"{held} numbers; put the config.json that belongs to the weights beside them"
        )


def _shapes(config: PretrainedConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """What a model can be given: name -> shape, and the weights of our modules that it holds, several if stacked."""
    # A copy: a model being made sets the attention of the configuration that it is given.
    architecture, model = architecture_of(config), empty_model(copy.deepcopy(config))
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, tensor in model.state_dict().items():
        shapes[name] = tuple(tensor.shape), (name,)
    for index, layer in enumerate(layers_of(model, architecture)):
        prefix = f"{architecture.layers}.{index}."
        for name, (shape, parts) in stacked(layer, architecture).items():
            shapes[prefix + name] = shape, tuple(prefix + part for part in parts)
    return shapes


def _require_fits(folder: Path, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.dtype in INTEGERS:
        raise CheckpointError(
            f"{folder} stores {tensor.name} in {tensor.dtype}, so its weights are quantized already; "
            "give the original float model"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder} stores {tensor.name} as {list(tensor.shape)} and its config.json asks for {list(shape)}; "
            "put the config.json that belongs to the weights beside them"
        )


def _incomplete(
    folder: Path, missing: list[str], unknown: Mapping[str, str], head: str, config: PretrainedConfig
) -> CheckpointError:
    """What to say of tensors that are missing."""
    if quantized := next((name for name in unknown.values() if QUANTIZED.search(name)), None):
        return CheckpointError(f"{folder} holds quantized weights ({quantized}); give the original float model")
    if adapter := next((name for name in unknown.values() if ADAPTER.search(name)), None):
        return CheckpointError(f"{folder} holds an adapter ({adapter}); merge it by peft's merge_and_unload, save that")
    for name in unknown.values():
        if own := next((own for own in missing if name.endswith(f".{own}")), None):
            return CheckpointError(
                f"{folder} names its tensors with {name.removesuffix(own)!r} before transformers' names, as a wrapper "
                "(compiled, parallel) has them; call save_pretrained on the model within it"
            )
    if missing == [head]:
        kind = ", ".join(config.architectures or []) or "no class"
        return CheckpointError(
            f"{folder} has no {head}, and its config.json ties it to nothing (tie_word_embeddings is false, it names "
            f"{kind}): no language model; give one with a head"
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return CheckpointError(
        f"{folder} has no tensor {missing[0]}{more}, which its config.json asks for; add the missing weights, or the "
        "config.json that belongs to these"
    )


def _judge(folder: Path, unknown: Mapping[str, str], within: tuple[str, ...], config: PretrainedConfig) -> None:
    """Refuse what is stored for the model's own modules and would change it; warn of the rest, as transformers does."""
    ignored = []
    for ours, name in sorted(unknown.items()):
        if FREQUENCIES.search(name):
            continue
        if QUANTIZED.search(name):
            raise CheckpointError(f"{folder} holds quantized weights ({name}); give the original float model")
        if ours.startswith(within) and not CACHE_SCALES.search(name):
            raise CheckpointError(
                f"{folder} stores {name}, which a {config.model_type} of its config.json does not have; correct "
                "config.json (biases, model_type), or remove the tensor if it is of no use"
            )
        ignored.append(name)
    if ignored:
        more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
        log.warning("%s: left out, the model does not have them: %s%s", folder, ", ".join(ignored[:3]), more)
