"""`rotations.safetensors`: the rotations of a model, float64, under our names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_pl.errors import CheckpointError, listed, reason
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.storage.files import write_tensors
from kurtail_pl.surgery.misfits import misfits
from kurtail_pl.surgery.rotations import Rotations

FILE = "rotations.safetensors"
METADATA = "rotations"
FUSED = ("residual", "value")
ONLINE = ("query_key", "attention_output", "mlp_hidden", "dense_hidden", "block_input")
PARTS = ("left", "right", "signs")
AGAIN = "copy the file again, or run kurtail fit or fuse again"


def write_rotations(path: Path, rotations: Rotations) -> None:
    """Write rotations; their origin and the constructions of the online ones go into the file's metadata."""
    online = {name: getattr(rotations, name) for name in ONLINE}
    constructions = {name: factors.construction for name, factors in online.items() if factors is not None}
    blocks = {name: factors.blocks for name, factors in online.items() if factors is not None and factors.blocks > 1}
    description = json.dumps(
        {"origin": rotations.origin, "constructions": constructions, **({"blocks": blocks} if blocks else {})}
    )
    write_tensors(path, _tensors(rotations), metadata=(METADATA, description))


def hash_of(rotations: Rotations) -> str:
    """Hexadecimal SHA-256 of the matrices, whatever their origin."""
    digest = hashlib.sha256()
    for name in ONLINE:
        factors = getattr(rotations, name)
        if factors is not None and factors.blocks > 1:
            digest.update(f"{name} in {factors.blocks} blocks".encode())
    for name, tensor in _tensors(rotations).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(rotations: Rotations) -> dict[str, Tensor]:
    tensors = {name: getattr(rotations, name) for name in FUSED}
    for name in ONLINE:
        factors = getattr(rotations, name)
        for part in PARTS if factors is not None else ():
            tensors[f"{name}.{part}"] = getattr(factors, part)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def read_rotations(path: Path) -> Rotations:
    """Read what `write_rotations` wrote; raises CheckpointError when the file is missing, damaged or another kind."""
    if not path.is_file():
        raise CheckpointError(f"rotations {path} do not exist; name the {FILE} that kurtail fit wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}); {AGAIN}") from error
    if METADATA not in metadata:
        raise CheckpointError(f"{path} holds no rotations: its metadata has no {METADATA!r}; {AGAIN}")
    try:
        description = json.loads(metadata[METADATA])
        constructions, origin = dict(description["constructions"]), dict(description["origin"])
        blocks = dict(description.get("blocks", {}))
        online = {
            name: HadamardFactors(
                tensors[f"{name}.left"],
                tensors[f"{name}.right"],
                str(construction),
                _count(blocks.get(name, 1)),
                tensors.get(f"{name}.signs"),
            )
            for name, construction in constructions.items()
        }
        rotations: dict[str, Any] = {name: tensors.get(name) for name in FUSED} | online
        return Rotations(**rotations, origin=origin)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} lacks part of its rotations ({reason(error)}); {AGAIN}") from error


def _count(blocks: Any) -> int:
    if not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"blocks are {blocks!r}, not a number from 1 on")
    return blocks


def require_rotations_of(config: PretrainedConfig, rotations: Rotations, name: str) -> None:
    """Raise CheckpointError, naming each difference, unless rotations have a model's sizes.

    Args:
        config: of the model.
        rotations: to be fused into it.
        name: of the rotations, for the message.
    """
    found = misfits(rotations, config)
    if found:
        raise CheckpointError(
            f"{name} belong to another model: {listed(found)}; give those that were learned on this model"
        )
