"""Recipes that come along, found by name; `kurtail recipes` lists them."""

from __future__ import annotations

import difflib
import fnmatch
from pathlib import Path

from kurtail_pl.cli.failures import UsageError
from kurtail_pl.cli.usage import SettingsParser
from kurtail_pl.errors import shortened

FOLDER = Path(__file__).resolve().parents[1] / "configs"
BASE = "base.yaml"


def recipes(arguments: list[str]) -> None:
    """List the recipes, with what each is for."""
    SettingsParser("kurtail recipes", description=recipes.__doc__).parse_args(arguments)
    named = shipped()
    width = max(len(path.stem) for path in named.values()) + 2
    folder = FOLDER
    for path in named.values():
        if path.parent != folder:
            folder = path.parent
            print(f"\n{folder.name}/")
        print(f"  {path.stem:<{width}}{summary(path)}")


def shipped() -> dict[str, Path]:
    """All recipes by folder and name."""
    paths = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (path.parent != FOLDER, path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}


def summary(path: Path) -> str:
    """The first line of a recipe: a comment that says what it is for."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def recipe_files(name: str) -> list[Path]:
    """The files of recipes that come along, by a pattern such as ``methods/*``; of any other name the one file."""
    found = fnmatch.filter(shipped(), name) if "*" in name else []
    return [shipped()[full] for full in found] or [recipe_file(name)]


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path, or one that comes along, by its name or with its folder.

    Raises:
        UsageError: when there is none, with the name that is most like it, or when the name is that of several.
    """
    if not name or name.startswith("--"):
        raise UsageError("--config names no file; give a recipe such as kurtail-plus, or a YAML file")
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    named = shipped()
    found = [full for full in named if name in (full, full.rpartition("/")[2])]
    if len(found) > 1:
        raise UsageError(f"there are several recipes {name!r}: {', '.join(found)}; name one of them")
    if not found and path.exists():
        return path
    if not found:
        short = {each for full in named for each in (full, full.rpartition("/")[2])}
        close = difflib.get_close_matches(name, short, n=1)
        like = f"; did you mean {close[0]}?" if close else "; kurtail recipes lists them."
        raise UsageError(f"there is no recipe {shortened(name, 60)!r}{like} A file is named with its ending, .yaml")
    return named[found[0]]
