"""From a GGUF file to a folder in the Hugging Face layout, by transformers' reader and compared with another one.

transformers leaves out what it has no place for and fills what is missing with random numbers, both without a word. So
the configuration is made here, every tensor of the file has to have its place, and each is compared with what the
package `gguf` reads.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel

from kurtail_pl.errors import CheckpointError, first_of, reason
from kurtail_pl.storage.files import cache_folder, new_folder, sha256_of, write_text
from kurtail_pl.storage.gguf_config import ELSEWHERE, ROPE_TENSORS, config_of
from kurtail_pl.storage.gguf_header import GgufHeader, read_header
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.statement import MODEL_CARD

log = logging.getLogger(__name__)

CONVERSION = 2
"""This number is part of a converted folder's name, so that what an earlier version of this module made is not used."""
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
TEMPLATE = "tokenizer.chat_template"


def from_gguf(path: Path, name: str) -> Path:
    """Dequantize a GGUF file once, to float32 safetensors in the cache folder.

    Args:
        path: the file.
        name: of the model, the beginning of the folder's name.

    Raises:
        CheckpointError: when the file is damaged, a part, or holds what cannot be carried over.
        UnsupportedArchitecture: when its architecture is not converted.
    """
    if not path.is_file():
        raise CheckpointError(f"GGUF file {path} does not exist; check the path")
    header = read_header(path)
    _require_whole(header)
    folder = cache_folder() / "models" / f"{name}-{sha256_of(path)[:12]}-{CONVERSION}"
    with alone_with(folder):
        if (folder / "config.json").is_file():
            return folder
        config = config_of(header)
        places = _places(header, config)
        log.info("converting %s to %s", path.name, folder)
        with new_folder(folder, overwrite=True) as partial:
            model = _model(header, config)
            _compare(header, model, places)
            model.save_pretrained(partial)
            _save_tokenizer(header, partial)
            if isinstance(license := header.metadata.get("general.license"), str):
                write_text(partial / MODEL_CARD, f"---\n{yaml.safe_dump({'license': license})}---\n")
    return folder


def _require_whole(header: GgufHeader) -> None:
    """Raise CheckpointError for one of several files."""
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return
    path, found = header.path, PART.search(header.path.name)
    if found is None or int(found[2]) != count:
        raise CheckpointError(f"{path} is one of the {count} parts of a model; give a file that holds all of it")
    parts = [path.with_name(f"{path.name[: found.start()]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    others = f"{', '.join(missing[:2])} {'and others are' if len(missing) > 2 else 'is'} missing beside it; get all, "
    raise CheckpointError(
        f"{path} is part {int(found[1])} of {count} of a model; {others if missing else ''}join them and give the "
        f"whole: llama-gguf-split --merge {parts[0].name} WHOLE.gguf"
    )


def _places(header: GgufHeader, config: PretrainedConfig) -> dict[str, tuple[str, ...]]:
    """For each of the model's tensors those of the file, whose rows follow one another in it.

    Raises:
        CheckpointError: naming a tensor that is missing, has no place or another shape.
    """
    shapes = _shapes(header, config)
    architecture = header.metadata["general.architecture"]
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    places = {name: _parts(name, names) for name in shapes}
    _require_places(header, {part for parts in places.values() for part in parts}, config)
    for name, parts in places.items():
        first, *_ = stored = [header.tensors[part].shape for part in parts]
        together = first if len(parts) == 1 else (first[0], sum(shape[1] for shape in stored), *first[2:])
        if together != shapes[name]:
            raise CheckpointError(
                f"{header.path} stores {parts[0]} as {list(first)} and its metadata ask for {list(shapes[name])} in "
                f"all; {ELSEWHERE}"
            )
    return places


def _shapes(header: GgufHeader, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a model holds, by their names in it."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # Of the family's modules, for sizes that they cannot have.
        raise CheckpointError(
            f"{header.path} describes no {config.model_type}: {reason(error)}; {ELSEWHERE}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _require_places(header: GgufHeader, wanted: set[str], config: PretrainedConfig) -> None:
    """Raise CheckpointError when a file lacks wanted tensors, or has others."""
    rope = ROPE_TENSORS.get(header.metadata["general.architecture"], ())
    missing = sorted(wanted - set(header.tensors))
    unknown = sorted(set(header.tensors) - wanted - {*rope})
    if missing:
        raise CheckpointError(f"{header.path} has no tensor {first_of(missing)}; give the file of the whole model")
    if unknown:
        raise CheckpointError(
            f"{header.path} has a tensor {first_of(unknown)} that a {config.model_type} has no place for; {ELSEWHERE}"
        )


def _parts(name: str, names: TensorNameMap) -> tuple[str, ...]:
    """Names in a file of what one tensor of the model holds; those of experts are stacked in both."""
    module, _, end = name.rpartition(".")
    if module.endswith(".experts"):
        block = f"blk.{module.split('.')[2]}.ffn_"
        return tuple(f"{block}{part}_exps.weight" for part in end.removesuffix("_proj").split("_"))
    return (f"{names.get_name(module)}.{end}",)


def _model(header: GgufHeader, config: PretrainedConfig) -> PreTrainedModel:
    """The model as transformers reads it."""
    path = header.path
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # Of the readers of transformers and gguf; what a file holds decides which.
        raise CheckpointError(f"transformers cannot read {path}: {reason(error)}; {ELSEWHERE}") from error
    model: PreTrainedModel
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found := sorted(map(str, info[problem])):
            said = f"{problem.replace('_', ' ')}: {found[0]}"
            raise CheckpointError(f"transformers does not read all of {path} ({said}); {ELSEWHERE}")
    return model


def _compare(header: GgufHeader, model: nn.Module, places: dict[str, tuple[str, ...]]) -> None:
    """Raise CheckpointError unless every tensor has the values that the package `gguf` reads."""
    state = model.state_dict()
    for name, parts in places.items():
        values = [_turned(header, part, model.config) for part in parts]
        expected = values[0] if len(values) == 1 else np.concatenate(values, 1)
        if not np.array_equal(state[name].numpy(), expected, equal_nan=True):
            raise CheckpointError(
                f"transformers reads other values in {header.path} than the package gguf, at {parts[0]}; update both, "
                f"or {ELSEWHERE}"
            )


def _turned(header: GgufHeader, name: str, config: Any) -> NDArray[np.float32]:
    """A tensor's values as transformers has them: rows of a llama's queries and keys that RoPE pairs are neighbours.

    Files of Gemma hold what norms multiply by, one more than their weights.
    """
    values, part = header.values(name), name.split(".")[2:3]
    if header.metadata["general.architecture"] == "gemma3" and name.endswith("norm.weight"):
        return values - 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(*part or [""])
    if header.metadata["general.architecture"] != "llama" or heads is None:
        return values
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(values.shape)


def _save_tokenizer(header: GgufHeader, folder: Path) -> None:
    path, metadata = header.path, header.metadata
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # As above.
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {reason(error)}; {ELSEWHERE}") from error
    named = {key.removeprefix(f"{TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{TEMPLATE}.")}
    for name, text in {"default": metadata.get(TEMPLATE, ""), **named}.items():
        # A name becomes a file's.
        if not isinstance(text, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise CheckpointError(f"{path}: chat template {name[:40]!r} is not text with a plain name; {ELSEWHERE}")
    if TEMPLATE in metadata:
        tokenizer.chat_template = {"default": metadata[TEMPLATE], **named} if named else metadata[TEMPLATE]
    elif named:
        tokenizer.chat_template = named
    tokenizer.save_pretrained(folder)
