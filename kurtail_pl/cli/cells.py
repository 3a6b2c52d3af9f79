"""The cells of a comparison: recipes, what they are compared with, seeds and ways to round weights, as settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from kurtail_pl.cli.naming import Settings, learned_by
from kurtail_pl.errors import ConfigError

FIXED = "kurtail_pl.lit.FixedRotations"
ROUNDINGS = ("float", "rtn", "gptq", "higgs")


@dataclass(frozen=True)
class Cell:
    """One model of the table: a complete recipe, and the seed of its rotations."""

    settings: Settings
    seed: int


def cells_of(recipes: list[Settings], weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """Every cell: the recipes, and what the first one is compared with, unless another recipe brings it."""
    recipes = list(_apart(recipes))
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


def _apart(recipes: list[Settings]) -> Iterator[Settings]:
    """Recipes without folders that an earlier one names for other rotations or another artefact."""
    runs: dict[str, Settings] = {}
    artefacts = set()
    for recipe in recipes:
        settings = copy.deepcopy(recipe)
        run, out = settings["trainer"]["default_root_dir"], settings["quantization"]["out"]
        if runs.setdefault(run, learned_by(settings)) != learned_by(settings):
            settings["trainer"]["default_root_dir"] = None
        if out in artefacts:
            settings["quantization"]["out"] = None
        artefacts.add(out)
        yield settings


def _fixed(settings: Settings) -> bool | None:
    """Whether a recipe's fixed rotations are Hadamards; None when its rotations are learned."""
    model = settings["model"]
    return bool(model["init_args"]["hadamard"]) if model["class_path"].endswith("FixedRotations") else None


def _baseline(settings: Settings, hadamard: bool) -> Settings:
    """A recipe with fixed rotations in place of learned ones: the same text, bits and evaluation.

    Scales and chosen signs are part of the method, as learned rotations are.
    """
    derived = _elsewhere(settings)
    seed = settings["model"]["init_args"]["rotation_seed"]
    derived["model"] = {"class_path": FIXED, "init_args": {"hadamard": hadamard, "rotation_seed": seed}}
    derived["fusion"] = {"scales": None, "signs": None}
    return derived


def _elsewhere(settings: Settings) -> Settings:
    """A copy whose run and artefact have folders of their own, named after what it is."""
    derived = copy.deepcopy(settings)
    derived["trainer"]["default_root_dir"] = derived["quantization"]["out"] = None
    return derived


def _variants(settings: Settings, weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """A recipe with each seed and each way to round its weights."""
    own = settings["model"]["init_args"]["rotation_seed"]
    for seed in seeds or [own]:
        seeded = settings if seed == own else _elsewhere(settings)
        seeded["model"]["init_args"]["rotation_seed"] = seed
        yield from (Cell(_rounded(seeded, rounding), seed) for rounding in weights or (None,))


def _rounded(settings: Settings, rounding: str | None) -> Settings:
    """A recipe whose weights become integers so; a way that is not its own has an artefact of its own."""
    changed = copy.deepcopy(settings)
    spec = changed["quantization"]
    if rounding not in (None, "higgs"):
        spec["scheme"]["higgs_bits"] = spec["average_bits"] = None
    if rounding == "float":
        spec["scheme"]["weights"] = None
    elif rounding is not None:
        if spec["scheme"]["weights"] is None:
            raise ConfigError(f"--weights {rounding} needs recipes that quantize weights; give scheme.weights")
        spec["method"] = rounding
    if spec != settings["quantization"]:
        spec["out"] = None
    return changed
