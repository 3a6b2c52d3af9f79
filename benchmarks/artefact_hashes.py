"""One hash for the tensors of each artefact: two versions of the program that make the same artefact print the same.

    python benchmarks/artefact_hashes.py artifacts/*

Names, types, shapes and bytes count; how they are spread over files does not. The last bits of learned rotations depend
on the processor and the number of threads: compare on one machine, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def tensors_sha256(folder: Path) -> str:
    """Hash of all tensors of a folder's `model*.safetensors`, in the order of their names."""
    places = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "np") as file:
            places |= dict.fromkeys(file.keys(), path)
    digest = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], "pt") as file:
            tensor = file.get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Print a line for each folder."""
    for folder in map(Path, sys.argv[1:]):
        if any(folder.glob("model*.safetensors")):
            print(tensors_sha256(folder), folder)


if __name__ == "__main__":
    main()
