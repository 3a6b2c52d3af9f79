"""A model's weights, written a decoder layer or so at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kurtail_pl.storage.files import tensor_bytes, write_json, write_tensors
from kurtail_pl.storage.weights import INDEX


class ShardWriter:
    """Writes a model's weights as numbered shards, one decoder layer or so at a time, and their index.

    Args:
        folder: where they go.
        shards: how many there will be; the Hugging Face names hold the number.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self._paths = [folder / f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, the first being 0."""
        write_tensors(self._paths[number], tensors)

    def close(self) -> None:
        """Write the index, after the last shard."""
        weight_map: dict[str, str] = {}
        size = 0
        for path in self._paths:
            sizes = tensor_bytes(path)
            weight_map.update(dict.fromkeys(sizes, path.name))
            size += sum(sizes.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(self._paths[0].with_name(INDEX), index)


def named(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a module under its name in the whole model."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}
