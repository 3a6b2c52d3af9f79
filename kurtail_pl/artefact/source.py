"""What an exporter builds from: the modules of an artefact, without weights, and its tensors, read when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.methods import TransformTuner
from kurtail_pl.storage.card import read_card, require_intact, rotations_of, scheme_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.layout import checkpoint_name
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import head_dim_of


class Source:
    """An artefact folder as an exporter sees it.

    Args:
        folder: what `kurtail fit`, `fuse` or `quantize` wrote.

    Raises:
        ArtefactError: when the folder is not a KurTail artefact, damaged or of a newer format.
        CheckpointError: when a file is missing.
        UnsupportedArchitecture: when the family is unknown.
    """

    def __init__(self, folder: Path) -> None:
        require_intact(folder)
        self.folder, self.checkpoint = folder, Checkpoint(folder)
        self.model = skeleton(self.checkpoint)
        self.architecture = architecture_of(self.config)
        self.scheme, self.rotations = scheme_of(folder), rotations_of(folder)
        card = read_card(folder)
        self.clips: list[dict[str, float]] = card.get("clips") or []
        # How the maps before its quantizers were learned, in words; None where there are none.
        mapped = bool(card.get("transforms"))
        self.maps = TransformTuner.from_dict(card["quantize"]["transforms"]).sentence() if mapped else None
        self.layers = list(layers_of(self.model, self.architecture))
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.head_dim = head_dim_of(self.config)

    @property
    def experts_differ(self) -> bool:
        """Whether experts map, centre or quantize what they read each in its own way, or have sides."""
        clipped = any("activations" in site for layer in self.clips for site in layer)
        own = self.scheme.centre or self.scheme.static or self.scheme.side is not None
        return own or clipped or self.maps is not None

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.checkpoint.config

    def layer_name(self, index: int) -> str:
        """Name of a decoder layer in the whole model."""
        return f"{self.architecture.layers}.{index}"

    def linear(self, name: str) -> QuantizedLinear:
        """A linear of the model, by its name in the whole model; on device ``meta``."""
        return cast(QuantizedLinear, self.model.get_submodule(name))

    def tensor(self, name: str) -> Tensor:
        """Read one tensor of the artefact, by its name in the model."""
        return self.checkpoint.tensor(checkpoint_name(name, self.architecture))

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor."""
        return self.checkpoint.dtype(checkpoint_name(name, self.architecture))
