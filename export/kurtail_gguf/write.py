"""A GGUF file from its plan: everything is known before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from kurtail_gguf.families import Family, family_of
from kurtail_gguf.metadata import metadata, put
from kurtail_gguf.rope import rope_of
from kurtail_gguf.tensors import Dense, Planned, file_type, planned
from kurtail_gguf.vocabulary import vocabulary
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.storage.files import require_space

MODEL = "model.gguf"


@dataclass(frozen=True)
class Plan:
    """What a file will hold."""

    family: Family
    keys: dict[str, Any]
    tensors: list[Planned]


def plan(source: Source, embedding: Dense, head: Dense) -> Plan:
    """The file of an artefact.

    Raises:
        ConfigError: when llama.cpp does not compute what the artefact does.
    """
    if source.scheme.prefix is not None:
        raise ConfigError(
            f"the tokens {source.scheme.prefix} stand before every text with a cache of their own, which a GGUF file "
            "has no place for; quantize with scheme.prefix: null"
        )
    if source.scheme.side is not None:
        raise ConfigError(
            f"beside the weights is {source.scheme.side.sentence()}, which a GGUF file has no place for; quantize with "
            "scheme.side: null"
        )
    family = family_of(source)
    rope = rope_of(source, family)
    keys = metadata(source, family, rope, file_type(source)) | vocabulary(source)
    frequencies = [
        Planned(name, Kind.F32, values.shape, lambda values=values: values)  # type: ignore[misc]
        for name, values in rope.tensors.items()
    ]
    return Plan(family, keys, [*planned(source, family, embedding, head), *frequencies])


def turned_at_run_time(source: Source) -> str | None:
    """Which rotations the weights expect and llama.cpp does not have, in a sentence."""
    readers = {"attention_output": "o_proj (R4)", "mlp_hidden": "down_proj (R5)"}
    turned = [reader for name, reader in readers.items() if name in source.rotations.online]
    if not turned:
        return None
    return (
        f"the artefact turns the inputs of {' and '.join(turned)} at run time, and llama.cpp has no such step; "
        "fuse the model with online: [query_key] (fusion.online in a recipe)"
    )


def write(source: Source, folder: Path, embedding: Dense, head: Dense) -> dict[str, Any]:
    """Write ``model.gguf``; weights pass through memory one tensor at a time.

    Returns:
        Architecture, types of the tensors, and what of the artefact is not in the file.
    """
    todo = plan(source, embedding, head)
    require_space(folder, sum(_bytes(tensor) for tensor in todo.tensors))
    writer = GGUFWriter(folder / MODEL, todo.family.name)
    put(writer, todo.keys)
    for tensor in todo.tensors:
        size = _bytes(tensor)
        writer.add_tensor_info(tensor.name, tensor.stored_shape, _dtype(tensor), size, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in todo.tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    writer.close()
    return description(source, todo)


def description(source: Source, todo: Plan) -> dict[str, Any]:
    """What a reader has to know."""
    counts: dict[str, int] = {}
    for tensor in todo.tensors:
        counts[tensor.kind.name] = counts.get(tensor.kind.name, 0) + 1
    return {
        "file": MODEL,
        "architecture": todo.family.name,
        "tensors": counts,
        "pre_tokenizer": todo.keys.get("tokenizer.ggml.pre", "sentencepiece"),
        "left_out": left_out(source),
    }


def left_out(source: Source) -> list[str]:
    """What the artefact computes with and the file does not hold, in words."""
    scheme, found = source.scheme, []
    if source.rotations.query_key is not None:
        found.append("R3, which changes no score; llama.cpp turns a quantized cache by a Hadamard of its own")
    if scheme.activations is not None:
        found.append(f"activations, {scheme.activations}; llama.cpp has int8 in blocks of 32")
    if scheme.cache is not None:
        found.append(f"the cache, {scheme.cache.sentence()}; llama.cpp has the one that it is started with")
    return found


def _dtype(tensor: Planned) -> np.dtype[Any]:
    names = {Kind.F32: "f4", Kind.F16: "f2"}
    return np.dtype(names.get(tensor.kind, "u1"))


def _bytes(tensor: Planned) -> int:
    return prod(tensor.stored_shape) * _dtype(tensor).itemsize
