"""`rotations.safetensors`: the rotations of a model, float64, under our names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kurtail_pl.errors import CheckpointError
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.storage.files import write_tensors
from kurtail_pl.surgery.rotations import Rotations

FILE = "rotations.safetensors"
METADATA = "rotations"
FUSED = ("residual", "value")
ONLINE = ("query_key", "attention_output", "mlp_hidden", "dense_hidden")


def write_rotations(path: Path, rotations: Rotations) -> None:
    """Write rotations; their origin and the constructions of the online ones go into the file's metadata."""
    online = {name: getattr(rotations, name) for name in ONLINE}
    constructions = {name: factors.construction for name, factors in online.items() if factors is not None}
    description = json.dumps({"origin": rotations.origin, "constructions": constructions})
    write_tensors(path, _tensors(rotations), metadata=(METADATA, description))


def hash_of(rotations: Rotations) -> str:
    """Hexadecimal SHA-256 of the matrices, whatever their origin."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(rotations).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(rotations: Rotations) -> dict[str, Tensor]:
    tensors = {name: getattr(rotations, name) for name in FUSED}
    for name in ONLINE:
        factors = getattr(rotations, name)
        tensors |= {} if factors is None else {f"{name}.left": factors.left, f"{name}.right": factors.right}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def read_rotations(path: Path) -> Rotations:
    """Read what `write_rotations` wrote; raises CheckpointError when the file is missing, damaged or another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        online = {
            name: HadamardFactors(tensors[f"{name}.left"], tensors[f"{name}.right"], construction)
            for name, construction in description["constructions"].items()
        }
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as rotations ({error!r}); run fit or fuse again") from error
    rotations: dict[str, Any] = {name: tensors.get(name) for name in FUSED} | online
    return Rotations(**rotations, origin=description["origin"])
