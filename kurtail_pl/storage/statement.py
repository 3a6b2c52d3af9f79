"""What a model folder states of its origin: its name on the Hugging Face hub, and the license in its model card."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from kurtail_pl.errors import reason

log = logging.getLogger(__name__)

MODEL_CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")
"""Entries of a card's front matter; the second and third go with ``license: other``."""


def origin_of(folder: Path) -> dict[str, str]:
    """Name of a plain model's folder (`model`), and its name on the hub (`hub`) and license where it states them."""
    name = _hub_name(folder)
    return {"model": folder.name, **({} if name is None else {"hub": name}), **_license(folder / MODEL_CARD)}


def _hub_name(folder: Path) -> str | None:
    """``organization/model`` of a download, by the hub's names in its cache."""
    if folder.parent.name != "snapshots":
        return None
    kind, *parts = folder.parents[1].name.split("--")
    return "/".join(parts) if kind == "models" else None


def _license(card: Path) -> dict[str, str]:
    if not card.is_file():
        return {}
    try:
        data = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        log.warning("no license is taken from %s, it cannot be read: %s", card, reason(error))
        return {}
    return {name: data[name] for name in LICENSE if isinstance(data.get(name), str)}
