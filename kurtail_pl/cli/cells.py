"""The cells of a comparison: recipes, what they are compared with, seeds and ways to round weights, as settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kurtail_pl.cli.naming import Settings, learned_by

FIXED = "kurtail_pl.lit.FixedRotations"
BASELINES = ["rtn", "gptq"]
"""Without --weights, an unrotated model is rounded by each of these recipes."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe, and under each way to round its weights, by the name of the recipe for that."""

    own: Settings
    rounded: Mapping[str, Settings]


@dataclass(frozen=True)
class Cell:
    """One model of the table: a complete recipe, the seed of its rotations, and the name of the system that it is."""

    settings: Settings
    seed: int
    name: str | None = None


def cells_of(recipes: list[Recipe], weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """Every cell: the recipes, and what the first one is compared with, unless another recipe brings it."""
    recipes = list(_apart(recipes))
    given = [_fixed(recipe.own) for recipe in recipes]
    for hadamard in (False, True):
        if hadamard not in given:
            # Without rotations there is nothing for a seed to decide, and both ways to round are baselines.
            roundings = weights or (BASELINES if not hadamard else None)
            yield from _variants(_baseline(recipes[0], hadamard), roundings, seeds if hadamard else None)
    for recipe in recipes:
        yield from _variants(recipe, weights, seeds if _fixed(recipe.own) is not False else None)


def cells_of_systems(
    systems: Mapping[str, Recipe], weights: list[str] | None, seeds: list[int] | None
) -> Iterator[Cell]:
    """Every cell of recipes that stand for themselves, by the names of the systems.

    Folders are named after what is in them, so that they are the same beside any other systems.
    """
    for name, recipe in systems.items():
        own = _changed(recipe, _elsewhere)
        for cell in _variants(own, weights, seeds if _fixed(own.own) is not False else None):
            yield replace(cell, name=name)


def order_of_making(cells: Sequence[Cell]) -> list[int]:
    """Numbers of cells, those together that share rotations and their fusion: a run folder holds one fused model."""
    shared = [[learned_by(cell.settings), cell.settings["fusion"]] for cell in cells]
    return sorted(range(len(cells)), key=lambda number: shared.index(shared[number]))


def _changed(recipe: Recipe, change: Callable[[Settings], None]) -> Recipe:
    """A copy with all its settings changed."""
    copied = copy.deepcopy(recipe)
    for settings in (copied.own, *copied.rounded.values()):
        change(settings)
    return copied


def _apart(recipes: list[Recipe]) -> Iterator[Recipe]:
    """Recipes without folders that an earlier one names for other rotations or another artefact."""
    runs: dict[str, Settings] = {}
    artefacts = set()
    for recipe in recipes:
        run, out = recipe.own["trainer"]["default_root_dir"], recipe.own["quantization"]["out"]
        other_run = runs.setdefault(run, learned_by(recipe.own)) != learned_by(recipe.own)
        other_out = out in artefacts
        artefacts.add(out)

        def moved(settings: Settings, run: bool = other_run, out: bool = other_out) -> None:
            if run:
                settings["trainer"]["default_root_dir"] = None
            if out:
                settings["quantization"]["out"] = None

        yield _changed(recipe, moved)


def _fixed(settings: Settings) -> bool | None:
    """Whether a recipe's fixed rotations are Hadamards; None when its rotations are learned."""
    model = settings["model"]
    return bool(model["init_args"]["hadamard"]) if model["class_path"].endswith("FixedRotations") else None


def _baseline(recipe: Recipe, hadamard: bool) -> Recipe:
    """A recipe with fixed rotations in place of learned ones: the same text, bits and evaluation.

    Scales, chosen signs and trained transforms are part of the method, as learned rotations are.
    """

    def fixed(settings: Settings) -> None:
        _elsewhere(settings)
        seed = settings["model"]["init_args"]["rotation_seed"]
        settings["model"] = {"class_path": FIXED, "init_args": {"hadamard": hadamard, "rotation_seed": seed}}
        settings["fusion"] |= {"scales": None, "signs": None}
        settings["quantization"]["transforms"] = None

    return _changed(recipe, fixed)


def _elsewhere(settings: Settings) -> None:
    """Give run and artefact folders of their own, named after what they are."""
    settings["trainer"]["default_root_dir"] = settings["quantization"]["out"] = None


def _variants(recipe: Recipe, weights: list[str] | None, seeds: list[int] | None) -> Iterator[Cell]:
    """A recipe with each seed and each way to round its weights."""
    own = recipe.own["model"]["init_args"]["rotation_seed"]
    for seed in seeds or [own]:

        def seeded(settings: Settings, seed: int = seed) -> None:
            if seed != own:
                _elsewhere(settings)
            settings["model"]["init_args"]["rotation_seed"] = seed

        each = _changed(recipe, seeded)
        yield from (Cell(_rounded(each, rounding), seed) for rounding in weights or (None,))


def _rounded(recipe: Recipe, rounding: str | None) -> Settings:
    """A recipe whose weights are rounded so; a way that is not its own has an artefact of its own."""
    if rounding is None:
        return recipe.own
    settings = recipe.rounded[rounding]
    if settings["quantization"] != recipe.own["quantization"]:
        settings["quantization"]["out"] = None
    return settings
