"""The exporter to vLLM: the type of its floats, and whether linears quantize what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.artefact.source import Source
from kurtail_vllm.card import notes
from kurtail_vllm.groups import Activations
from kurtail_vllm.refusals import reasons

Float = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class VLLM(Exporter):
    """A folder for vLLM in the layout of compressed-tensors, with the artefact's codes as they are.

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

    def sentence(self) -> str:
        """What is written."""
        kept = "activations as the artefact's" if self.activations == "auto" else "float activations"
        return f"a compressed-tensors folder for vLLM: {self.dtype}, {kept}"

    def refuses(self, source: Source) -> str | None:
        """What vLLM does not compute: the setting, and what it takes instead."""
        return next(reasons(source, self.dtype, self.activations), None)

    # What writes and compares is built by these settings, and imports this file.

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        """Write the weights, ``config.json`` and the tokenizer.

        Raises:
            ConfigError: when the type does not hold a scale exactly, or a value at all.
            DiskFull: when the weights do not fit.
        """
        from kurtail_vllm.write import write

        return write(source, self, folder)

    def check(self, source: Source, folder: Path) -> dict[str, Any]:
        """Prove the export equal to the artefact; see `verify.check`."""
        from kurtail_vllm.verify.check import check

        return check(source, self, folder)

    def notes(self, description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
        """How the folder is run, what proves it, and what other runtimes make of it."""
        return notes(description, checks)
