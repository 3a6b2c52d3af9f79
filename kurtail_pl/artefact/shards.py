"""A model's weights, written a decoder layer or so at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kurtail_pl.storage.files import write_tensors
from kurtail_pl.storage.joining import join


class ShardWriter:
    """Writes a model's weights in parts, each a file, and joins these into files as the Hugging Face hub has them.

    Until it is closed, what was written may be taken up by another process; for a while the weights are there twice.

    Args:
        folder: where the weights go.
        scratch: where the parts are kept meanwhile; whoever made it removes it.
        parts: how many there will be.
    """

    def __init__(self, folder: Path, scratch: Path, parts: int) -> None:
        self._folder = folder
        self._parts = [scratch / f"part-{number:05d}.safetensors" for number in range(parts)]

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part, the first being 0; raises NotFinite for a value that is no number."""
        write_tensors(self._parts[number], tensors)

    def close(self) -> None:
        """Join the parts, all of which have been written."""
        join(self._parts, self._folder)


def named(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a module under its name in the whole model."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}
