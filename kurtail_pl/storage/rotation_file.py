"""`rotations.safetensors`: the rotations of a model, float64, under our names."""

from __future__ import annotations

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
ONLINE = ("query_key", "attention_output", "mlp_hidden")


def write_rotations(path: Path, rotations: Rotations) -> None:
    """Write rotations; their origin and the constructions of the online ones go into the file's metadata."""
    tensors: dict[str, Tensor] = {}
    constructions: dict[str, str] = {}
    for name in FUSED:
        matrix = getattr(rotations, name)
        if matrix is not None:
            tensors[name] = matrix
    for name in ONLINE:
        factors = getattr(rotations, name)
        if factors is not None:
            tensors[f"{name}.left"], tensors[f"{name}.right"] = factors.left, factors.right
            constructions[name] = factors.construction
    description = json.dumps({"origin": rotations.origin, "constructions": constructions})
    write_tensors(path, tensors, metadata=(METADATA, description))


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
