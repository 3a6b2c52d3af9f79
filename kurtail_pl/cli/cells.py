"""The cells of a comparison: recipes, what they are compared with, seeds and ways to round weights, as settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kurtail_pl.errors import ConfigError

FIXED, ROWS = "kurtail_pl.lit.FixedRotations", "kurtail_pl.lit.ActivationDataModule"
ROUNDINGS = ("float", "rtn", "gptq", "higgs")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model of the table: a complete recipe, and the seed of its rotations."""

    settings: Settings
    seed: int

    @property
    def root(self) -> str:
        """Its run folder; cells that differ in the weights alone share one, and learn once."""
        return str(self.settings["trainer"]["default_root_dir"])


def cells_of(recipes: list[Settings], weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """Every cell: the recipes, and what the first one is compared with, unless another recipe brings it."""
    given = [_fixed(settings) for settings in recipes]
    for hadamard in (False, True):
        if hadamard not in given:
            # Without rotations there is nothing for a seed to decide, and both ways to round are baselines.
            yield from _variants(
                _baseline(recipes[0], hadamard),
                weights or (["rtn", "gptq"] if not hadamard else None),
                seeds if hadamard else None,
            )
    for settings in recipes:
        yield from _variants(settings, weights, seeds if _fixed(settings) is not False else None)


def _fixed(settings: Settings) -> bool | None:
    """Whether a recipe's fixed rotations are Hadamards; None when its rotations are learned."""
    model = settings["model"]
    return bool(model["init_args"]["hadamard"]) if model["class_path"].endswith("FixedRotations") else None


def _baseline(settings: Settings, hadamard: bool) -> Settings:
    """A recipe with fixed rotations in place of learned ones: the same text, store, bits and evaluation."""
    derived = copy.deepcopy(settings)
    seed = settings["model"]["init_args"]["rotation_seed"]
    derived["model"] = {"class_path": FIXED, "init_args": {"hadamard": hadamard, "rotation_seed": seed}}
    data = derived["data"]["init_args"]
    kept = {name: data[name] for name in ("capture", "store", "steps", "validation_rows", "compute")}
    derived["data"] = {"class_path": ROWS, "init_args": kept | {"batch_rows": 1}}
    trainer = derived["trainer"]
    trainer["max_epochs"] = 0
    learners = ("ModelCheckpoint", "Figures")
    trainer["callbacks"] = [c for c in trainer["callbacks"] if not c["class_path"].endswith(learners)]
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith(".Fusion"):
            # Scales and chosen signs are part of the method, as learned rotations are.
            callback["init_args"] = {"scales": None, "signs": None}
    _move(derived, "quarot" if hadamard else "none")
    return derived


def _variants(settings: Settings, weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """A recipe with each seed and each way to round its weights."""
    own = settings["model"]["init_args"]["rotation_seed"]
    for seed in seeds or [own]:
        seeded = copy.deepcopy(settings)
        if seed != own:
            seeded["model"]["init_args"]["rotation_seed"] = seed
            _move(seeded, f"seed{seed}")
        yield from (Cell(_rounded(seeded, rounding), seed) for rounding in weights or (None,))


def _move(settings: Settings, name: str) -> None:
    """Give a variant a run folder beside the recipe's, and to a seed artefacts of its own."""
    root = settings["trainer"]["default_root_dir"]
    settings["trainer"] = _renamed(settings["trainer"], root, f"{root}-{name}")
    if name.startswith("seed"):
        quantization = settings_of(settings, "WeightQuantization")
        quantization["artefacts"] = f"{quantization['artefacts']}/{name}"


def _renamed(value: Any, old: str, new: str) -> Any:
    """Settings in which a folder, and all that lies in it, has another name."""
    if isinstance(value, dict):
        return {key: _renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith(f"{old}/"))
    return new + value.removeprefix(old) if inside else value


def _rounded(settings: Settings, rounding: str | None) -> Settings:
    """A recipe whose weights become integers so; a way that is not its own has artefacts of its own."""
    changed = copy.deepcopy(settings)
    quantization = settings_of(changed, "WeightQuantization")
    spec = quantization["quantize"]
    if rounding not in (None, "higgs"):
        spec["scheme"]["higgs_bits"] = spec["average_bits"] = None
    if rounding == "float":
        spec["scheme"]["weights"] = None
    elif rounding is not None:
        if spec["scheme"]["weights"] is None:
            raise ConfigError(f"--weights {rounding} needs recipes that quantize weights; give scheme.weights")
        # Without rotations, the way to round is the artefact's name.
        if rounding != spec["method"] and _fixed(settings) is not False:
            quantization["artefacts"] = f"{quantization['artefacts']}/{rounding}"
        spec["method"] = rounding
    return changed


def settings_of(settings: Settings, name: str) -> Settings:
    """Settings of one of a recipe's callbacks; raises ConfigError when there is none."""
    for callback in settings["trainer"]["callbacks"] or []:
        if callback["class_path"].endswith(f".{name}"):
            found: Settings = callback["init_args"]
            return found
    raise ConfigError(f"the recipe has no callback {name}; add it to trainer.callbacks")
