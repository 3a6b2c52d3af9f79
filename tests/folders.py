"""Changes of an artefact's files that leave it whole."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kurtail_pl.storage.card import read_card, write_card
from kurtail_pl.storage.weights import SINGLE


def with_tensors(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Change the tensors of an artefact, and its card with them."""
    tensors = load_file(folder / SINGLE)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    card = read_card(folder)
    write_card(folder, {name: value for name, value in card.items() if name not in ("format", "sha256")})
    return folder


def with_half_scales(folder: Path) -> Path:
    """Round the scales of an artefact's weights to what float16 holds."""
    return with_tensors(folder, lambda name, tensor: tensor.half().float() if name.endswith(".scale") else tensor)
