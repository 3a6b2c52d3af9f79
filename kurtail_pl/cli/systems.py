"""The systems of a comparison: a recipe for each, looked at before any work; those that cannot be made are refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from kurtail_pl.cli.arguments import check_recipe
from kurtail_pl.cli.cells import Cell, Recipe, cells_of_systems
from kurtail_pl.cli.failures import UsageError, ours_in
from kurtail_pl.cli.making import Maker, recipe_of
from kurtail_pl.cli.recipes import recipe_files
from kurtail_pl.errors import ConfigError, KurtailError, TextError, UnsupportedArchitecture

log = logging.getLogger(__name__)

REFUSALS = (ConfigError, TextError, UnsupportedArchitecture, UsageError)
"""A recipe asks for what it cannot have; anything else that goes wrong stops the comparison."""
Group = list[list[str]]
"""What stands after one ``--config``: of each recipe there the files, each over the one before it."""


def overlays(names: Sequence[str]) -> list[str]:
    """Recipes, one over the other, as options."""
    return [argument for name in names for argument in ("--config", name)]


def groups_of(names: Sequence[Sequence[str]]) -> list[Group]:
    """The files of what stands after each ``--config``, looked at.

    Args:
        names: of recipes. One may be several, with commas between, that go over one another, or a pattern of names.

    Raises:
        UsageError: when a recipe cannot be read.
    """
    groups = [[files for name in some for files in _alternatives(name)] for some in names]
    for file in dict.fromkeys(file for group in groups for files in group for file in files):
        check_recipe(Path(file))
    return groups


def _alternatives(name: str) -> Group:
    return [list(map(str, files)) for files in product(*map(recipe_files, name.split(",")))]


def named_systems(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The files of each system, by its name; none where there is nothing to choose from.

    Args:
        groups: one recipe that all systems have, or several of which each has one, in every combination.

    Raises:
        UsageError: when two systems have one name.
    """
    systems: dict[str, list[str]] = {}
    for chosen in product(*groups) if any(len(group) > 1 for group in groups) else ():
        own = [file for group, files in zip(groups, chosen, strict=True) if len(group) > 1 for file in files]
        title = " + ".join(Path(file).stem for file in own)
        if title in systems:
            raise UsageError(f"two systems are called {title}; name each recipe once, and their files differently")
        systems[title] = [file for files in chosen for file in files]
    return systems


def systems_of(
    systems: Mapping[str, Sequence[str]],
    overrides: list[str],
    weights: list[str] | None,
    seeds: list[int] | None,
    maker: Maker,
) -> tuple[list[Cell], dict[str, str]]:
    """The cells of systems, and why others are refused.

    Everything is looked at that can be before the first one is made, as `fit` looks at a recipe.

    Raises:
        KurtailError: when none can be made, as the first one says.
    """
    refused: dict[str, KurtailError] = {}
    recipes: dict[str, Recipe] = {}
    for name, files in systems.items():
        with _refusal(name, refused):
            recipe = recipe_of([*overlays(files), *overrides], weights or [])
            _require_alike(recipe, next(iter(recipes.items()), None))
            recipes[name] = recipe
    cells: list[Cell] = []
    seed_of: dict[str, int] = {}
    for cell in cells_of_systems(recipes, weights, seeds):
        assert cell.name is not None
        with _refusal(cell.name, refused):
            if cell.seed == seed_of.setdefault(cell.name, cell.seed):
                maker.check(cell)  # Other seeds are refused for nothing else.
            if cell.name not in refused:
                cells.append(cell)
    if not cells:
        name, first = next(iter(refused.items()))
        raise type(first)(f"{name}: {first}")
    return cells, {name: str(error) for name, error in refused.items()}


def _require_alike(recipe: Recipe, first: tuple[str, Recipe] | None) -> None:
    """Raise ConfigError when a recipe is not measured as the first one is."""
    if first is None:
        return
    name, other = first
    for part, own in _measured_on(recipe).items():
        if own != _measured_on(other)[part]:
            raise ConfigError(f"its {part} is another than that of {name}, and one table has one: leave it out")


def _measured_on(recipe: Recipe) -> dict[str, Any]:
    own = recipe.own
    return {"evaluation": own["evaluation"], "model": own["data"]["init_args"]["capture"]["model"]}


@contextmanager
def _refusal(name: str, refused: dict[str, KurtailError]) -> Iterator[None]:
    """Note what a system is refused for, and go on."""
    try:
        yield
    except Exception as error:
        ours = ours_in(error)
        if not isinstance(ours, REFUSALS):
            raise
        refused[name] = ours
        log.warning("refused: %s: %s", name, ours)
