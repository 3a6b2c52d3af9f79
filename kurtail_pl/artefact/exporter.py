"""Exporters: an artefact as the files of another runtime."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from kurtail_pl.artefact.source import Source
from kurtail_pl.methods.method import Method


class Exporter(Method):
    """Writes an artefact in one format; its settings are what the artefact leaves open.

    Its sentence says what is written: "an ONNX graph in fp32". The package that holds it declares it as an entry point
    of the group ``kurtail.exporters``, by the name that `kurtail export --to` takes.
    """

    maps: ClassVar[bool] = False
    """Whether it writes learned maps, each of its own layer and place."""

    def refused(self, source: Source) -> str | None:
        """Why an artefact cannot be written, in one sentence; None when it can."""
        if source.maps is not None and not self.maps:
            return (
                f"the artefact is {source.maps}, and the export has no place for maps at run time: quantize with "
                "transforms: null, or use the artefact with kurtail_pl.load"
            )
        return self.refuses(source)

    @abstractmethod
    def refuses(self, source: Source) -> str | None:
        """Why an artefact cannot be written so, in one sentence that names the setting to change; None when it can."""

    def garbage(self, source: Source) -> str | None:
        """Why the runtime would answer with garbage, in one sentence that names the setting to change; None otherwise.

        It is for what the weights expect and the runtime leaves out, such as a rotation; the files can be written.
        """
        return None

    @abstractmethod
    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        """Write the files into a new empty folder.

        Returns:
            What their reader has to know beside them, as plain data for ``kurtail_export.json``.
        """

    @abstractmethod
    def check(self, source: Source, folder: Path) -> dict[str, Any]:
        """Compare what was written with the artefact.

        Returns:
            What was compared and found, as plain data for ``checks.json``.

        Raises:
            CheckFailed: when the files are not the artefact's model.
        """

    def notes(self, description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
        """Lines of the export's model card: what was found, what to expect, how the files are run.

        Args:
            description: content of ``kurtail_export.json``.
            checks: content of ``checks.json``; None when nothing was checked.
        """
        return []
