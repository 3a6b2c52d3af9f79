"""An artefact to the files of another runtime: what is the same whatever the exporter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.card import read_card
from kurtail_pl.storage.files import (
    gigabytes,
    new_folder,
    refuse_finished,
    require_space,
    sha256_of,
    write_json,
    write_text,
)

log = logging.getLogger(__name__)

FORMAT = 2
DESCRIPTION, CHECKS, CARD = "kurtail_export.json", "checks.json", "README.md"
LARGEST_BY_DEFAULT = 1_000_000_000
"""Exports of at most this many bytes are checked when nobody says whether."""


def export(
    artefact: Path,
    out: Path,
    exporter: Exporter,
    check: bool | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Path:
    """Write an artefact as an exporter does, with a description of where it comes from, and check it.

    Args:
        artefact: folder that kurtail fit, fuse or quantize wrote.
        out: folder of the export.
        exporter: the format, and its settings.
        check: compare with the torch model, and keep nothing if it differs; by default for up to a gigabyte.
        overwrite: replace `out` if it exists.
        force: write, unchecked, also what the runtime would answer with garbage.

    Raises:
        ArtefactError: when the artefact is damaged or of a newer format, or `out` exists.
        CheckFailed: when what was written is not the artefact's model.
        ConfigError: when the exporter refuses the artefact.
        DiskFull: when the export does not fit.
        UnsupportedArchitecture: when the exporter does not know the family, or a part of it.
    """
    refuse_finished(out, overwrite)
    source = Source(artefact)
    if reason := exporter.refused(source):
        raise ConfigError(reason)
    garbage = exporter.garbage(source)
    if garbage is not None:
        if not force:
            raise ConfigError(f"{garbage}; or pass --force, and get a file that answers with garbage")
        log.warning("forced: %s", garbage)
        check = False
    # Codes stay codes and floats floats: no export is much smaller than its artefact.
    require_space(out, size_of(artefact))
    with Meter() as meter, new_folder(out, overwrite) as partial:
        own = exporter.write(source, partial)
        description = _description(source, exporter, partial) | own | ({} if garbage is None else {"garbage": garbage})
        write_json(partial / DESCRIPTION, description)
        wanted = small_enough(partial) if check is None else check
        checks = exporter.check(source, partial) if wanted else None
        if checks is not None:
            write_json(partial / CHECKS, checks)
        write_text(partial / CARD, _card(out.name, exporter, description, checks))
    size, peak = gigabytes(size_of(out)), gigabytes(meter.peak_bytes)
    log.info("exported %s to %s in %.0f s (%s, peak memory %s)", artefact, out, meter.seconds, size, peak)
    return out


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def small_enough(folder: Path) -> bool:
    """Whether an export is checked when nobody says so."""
    return size_of(folder) <= LARGEST_BY_DEFAULT


def _description(source: Source, exporter: Exporter, folder: Path) -> dict[str, Any]:
    card = read_card(source.folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "export": exporter.to_dict(),
        "source": {"artefact": source.folder.name, "method": card["method"], **card["source"]},
        "versions": versions(),
        "sha256": {path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
    }


def _card(name: str, exporter: Exporter, description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> str:
    source = description["source"]
    origin = f"{source['model']} (weights {source['sha256'][:12]}), quantized by {source['method']}"
    proof = (
        "This export was not checked; `kurtail export --check` compares it with the torch model."
        if checks is None
        else f"This export was compared with the torch model; `{CHECKS}` has what was found."
    )
    if reason := description.get("garbage"):
        proof = f"**It answers with garbage, and was forced: {reason}.** {proof}"
    notes = exporter.notes(description, checks)
    return "\n".join([f"# {name}", "", f"{origin}, as {exporter.sentence()}.", "", proof, "", *notes]).rstrip() + "\n"
