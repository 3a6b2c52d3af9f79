"""The exporter to vLLM: what it refuses, and where its writing and its check are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kurtail_pl.artefact.source import Source
from kurtail_vllm.card import notes
from kurtail_vllm.refusals import reasons
from kurtail_vllm.settings import Settings


class VLLM(Settings):
    """A folder for vLLM in the layout of compressed-tensors, with the artefact's codes as they are."""

    def sentence(self) -> str:
        """What is written."""
        kept = "activations as the artefact's" if self.activations == "auto" else "float activations"
        return f"a compressed-tensors folder for vLLM: {self.dtype}, {kept}"

    def refuses(self, source: Source) -> str | None:
        """What vLLM does not compute: the setting, and what it takes instead."""
        return next(reasons(source, self.dtype, self.activations), None)

    # What compares needs transformers' models, which help and refusals do without.

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
