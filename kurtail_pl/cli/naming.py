"""Folders that a recipe leaves open: `runs/MODEL/store`, `runs/MODEL/METHOD` and `artifacts/MODEL-METHOD-BITS`.

Where settings that decide what is in a folder are others than those of `configs/base.yaml`, six digits of their hash
follow, so that what differs has different names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kurtail_pl.lit.datamodule import runs_of
from kurtail_pl.storage.files import sha256_of_text

Settings = dict[str, Any]


def run_folder(settings: Settings, base: Settings, method: str) -> Path:
    """Where a method's rotations, checkpoints and fused model go."""
    return _of_model(settings) / f"{method}{_suffix(learned_by(settings), learned_by(base))}"


def store_folder(settings: Settings, base: Settings) -> Path:
    """Where captured activations go."""
    return _of_model(settings) / f"store{_suffix(_captured_by(settings), _captured_by(base))}"


def artefact_suffix(settings: Settings, base: Settings) -> str:
    """What tells an artefact apart from others of the same model, method and bits."""
    return _suffix(made_by(settings), made_by(base))


def reference_suffix(settings: Settings, base: Settings) -> str:
    """What tells measurements of the float model apart."""
    measured, usual = ([_captured_by(each), _relative(each["evaluation"], each)] for each in (settings, base))
    return _suffix(measured, usual)


def made_by(settings: Settings) -> Settings:
    """The settings of a recipe that decide its artefact: not where things are put or computed, nor the model."""
    return {
        **learned_by(settings),
        "target": settings["target"],
        "fusion": _relative(settings["fusion"], settings),
        "quantization": _relative(
            {name: value for name, value in settings["quantization"].items() if name != "out"}, settings
        ),
    }


def learned_by(settings: Settings) -> Settings:
    """Those that decide its rotations."""
    data = {name: value for name, value in settings["data"]["init_args"].items() if name not in ("store", "compute")}
    block_size = settings["fusion"].get("block_size")  # Older recipes have none.
    return {
        **({} if block_size is None else {"block_size": block_size}),
        "model": settings["model"],
        "data": {**_relative(data, settings), "capture": _captured_by(settings)},
        "dtype": settings["data"]["init_args"]["compute"]["dtype"],
        "seed_everything": settings["seed_everything"],
    }


def _captured_by(settings: Settings) -> Settings:
    return {name: value for name, value in settings["data"]["init_args"]["capture"].items() if name != "model"}


def _relative(value: Any, settings: Settings) -> Any:
    """A part of a recipe whose texts have no source where it is that of the activations, as before it was filled in."""
    captured = settings["data"]["init_args"]["capture"]["text"]["source"]
    if not isinstance(value, dict):
        return value
    return {
        name: None if name == "source" and each == captured else _relative(each, settings)
        for name, each in value.items()
    }


def _of_model(settings: Settings) -> Path:
    return runs_of(settings["data"]["init_args"]["capture"]["model"])


def _suffix(settings: Any, usual: Any) -> str:
    return "" if settings == usual else "-" + sha256_of_text(json.dumps(settings, sort_keys=True))[:6]
