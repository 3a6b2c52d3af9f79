"""A model folder that KurTail made: Hugging Face layout plus `rotations.safetensors` and `kurtail.json`.

`kurtail.json` is written last; a folder without it is a plain model folder. It holds what is needed to repeat the
folder: method, scheme, settings, seeds, versions, and hashes of the model, text and rotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import with_config

from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.storage.files import sha256_of_each, write_json
from kurtail_pl.storage.mark import CARD as CARD
from kurtail_pl.storage.mark import require_card
from kurtail_pl.storage.records import OTHERS_TOO, Number, fields_of, read_object, require_format, require_inside
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import read_rotations
from kurtail_pl.surgery.rotations import Rotations

FORMAT = 3
AGAIN = "copy the folder again or make it again"


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write `kurtail.json`, the last file of a folder, with the hashes of every other file."""
    # A process that was killed while or after it wrote the card left one of the same folder, maybe under a hidden name.
    others = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != CARD and not p.name.startswith(".")]
    hashes = {path.name: sha256 for path, sha256 in sha256_of_each(others).items()}
    write_json(folder / CARD, {"format": FORMAT, **card, "sha256": hashes})


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Source:
    model: str
    sha256: str
    hub: str | None = None


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Quantize:
    rounder: dict[str, Any]
    matching: dict[str, Any] | None = None
    clips: dict[str, Any] | None = None
    transforms: dict[str, Any] | None = None
    target: str = "torch"


@dataclass(frozen=True)
class _Card:
    """What is read of a card, beside its format."""

    method: str
    scheme: Scheme
    source: _Source
    sha256: dict[str, str]
    cost: dict[str, dict[str, float]]
    rotations: dict[str, Any] = field(default_factory=dict)
    clips: list[dict[str, float]] | None = None
    transforms: list[dict[str, float]] | None = None
    quantize: _Quantize | None = None
    rounding: str = ""
    errors: dict[str, dict[str, Number]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    borrowers: list[str] = field(default_factory=list)
    expert_tokens: dict[str, int] = field(default_factory=dict)
    bits_per_weight: Number | None = None
    calibration_text_sha256: str | None = None
    fuse: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read_card(folder: Path) -> dict[str, Any]:
    """Read `kurtail.json`.

    Raises:
        ArtefactError: when the folder has none, its format is unknown, a field is missing or of another type, or it
            names a file outside the folder.
    """
    path = folder / CARD
    _require_card(folder)
    card = read_object(path, ArtefactError, AGAIN)
    require_format(card, FORMAT, path, ArtefactError)
    for name in fields_of(card, _Card, path, ArtefactError, AGAIN).sha256:
        require_inside(name, path, ArtefactError)
    return card


def _require_card(folder: Path) -> None:
    if not is_ours(folder):
        wrong = f"is no finished folder of kurtail's: it has no {CARD}" if folder.exists() else "does not exist"
        raise ArtefactError(f"{folder} {wrong}; name one that kurtail fit, fuse or quantize wrote")


def require_intact(folder: Path) -> None:
    """Raise ArtefactError when the folder is not a finished one of ours, or a file is not the one that was written."""
    _require_card(folder)
    expected = {folder / name: sha256 for name, sha256 in read_card(folder)["sha256"].items()}
    for path in expected:
        if not path.is_file():
            raise ArtefactError(f"{path} is missing; {AGAIN}")
    for path, found in sha256_of_each([*expected]).items():
        if found != expected[path]:
            raise ArtefactError(f"{path} is damaged (its hash changed); {AGAIN}")


def require_sound(folder: Path) -> None:
    """`require_intact` of a model folder that KurTail made; of a plain one nothing is known."""
    if is_ours(folder):
        require_intact(folder)


def is_ours(folder: Path) -> bool:
    """Whether a model folder has rotations or quantized weights."""
    return (folder / CARD).is_file()


def require_plain(folder: Path) -> None:
    """Raise ArtefactError when a KurTail folder stands where a plain model is wanted."""
    require_card(folder)
    if is_ours(folder):
        card = read_card(folder)
        kind = "a quantized artefact" if "quantize" in card else "a fused model"
        raise ArtefactError(
            f"{folder} is {kind} of kurtail's (method {card.get('method')}), and a plain model is wanted here; "
            f"give the one that it was made from ({card.get('source', {}).get('model')})"
        )


def scheme_of(folder: Path) -> Scheme:
    """Scheme of a model folder; a plain one is float."""
    return Scheme.from_dict(read_card(folder)["scheme"]) if is_ours(folder) else FLOAT


def rotations_of(folder: Path) -> Rotations:
    """Rotations of a model folder; a plain one has none."""
    return read_rotations(folder / ROTATIONS) if is_ours(folder) else Rotations()
