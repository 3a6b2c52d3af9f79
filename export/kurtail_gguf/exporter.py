"""The exporter to GGUF: what embedding and head are stored as; codes stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf.card import notes
from kurtail_gguf.tensors import Dense
from kurtail_gguf.verify.check import check
from kurtail_gguf.write import plan, turned_at_run_time, write
from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError


@dataclass(frozen=True)
class GGUF(Exporter):
    """A file for llama.cpp that holds the artefact's codes and scales, rounded no second time.

    Args:
        embedding: f16, or q8_0: 8 bits in blocks of 32, rounded here.
        head: the same for the output's weight, which is read once for each token.
    """

    embedding: Dense = "f16"
    head: Dense = "f16"

    def sentence(self) -> str:
        """What is written."""
        return f"a GGUF file for llama.cpp: embedding {self.embedding}, head {self.head}"

    def refuses(self, source: Source) -> str | None:
        """Whatever has no place in the file: all of it is planned, and nothing written."""
        try:
            plan(source, self.embedding, self.head)
        except ConfigError as reason:
            return str(reason)
        return None

    def garbage(self, source: Source) -> str | None:
        """Rotations at run time, of which llama.cpp has none."""
        return turned_at_run_time(source)

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        """Write ``model.gguf``.

        Raises:
            ConfigError: when float16 does not hold a scale.
            DiskFull: when the file does not fit.
        """
        return write(source, folder, self.embedding, self.head)

    def check(self, source: Source, folder: Path) -> dict[str, Any]:
        """Prove the file equal to the artefact, and run it; see `verify.check`."""
        return check(source, folder)

    def notes(self, description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
        """What runs, what was proven, and how the file is run."""
        return notes(description, checks)
