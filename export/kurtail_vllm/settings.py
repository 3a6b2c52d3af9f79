"""What an export to vLLM can be asked for; what writes, checks and describes it is built by these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kurtail_pl.artefact.exporter import Exporter

Float = Literal["float16", "bfloat16", "float32"]
Activations = Literal["auto", "none"]


@dataclass(frozen=True)
class Settings(Exporter):
    """What an export to vLLM can be asked for.

    Args:
        dtype: of everything that is no code, scales too: float16, bfloat16, or float32, of which vLLM has no kernels
            and transformers has.
        activations: auto quantizes what linears read as the artefact does, none leaves it float.
    """

    dtype: Float = "float16"
    activations: Activations = "auto"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of everything that is no code."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
