"""`kurtail compare`: recipes, their baselines, seeds and ways to round weights, each made by `fit`, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.cells import BASELINES, cells_of
from kurtail_pl.cli.making import Maker, default_folder, recipe_of
from kurtail_pl.cli.usage import OneLineParser
from kurtail_pl.stages.reporting.comparison import Row, write_comparison
from kurtail_pl.storage.lock import alone_with


def compare(arguments: list[str]) -> None:
    """Run recipes, their baselines and seeds, and print one table."""
    options, overrides = _options(arguments)
    common = [argument for path in options.config for argument in ("--config", path)]
    # The baselines are those of the first recipe.
    recipes = [
        recipe_of([*common, *overrides], options.weights or BASELINES),
        *(recipe_of([*common, *_overlays(names), *overrides], options.weights or []) for names in options.others),
    ]
    maker = Maker(options.out or default_folder(options.config), options.overwrite)
    rows: list[Row] = []
    for cell in cells_of(recipes, options.weights, options.seeds):
        parsed = maker.parse(cell)
        rows.append(maker.make(parsed))
        if len(rows) == 1:
            rows.insert(0, maker.measure_float(parsed))
    with alone_with(maker.folder):
        print(write_comparison(rows, maker.folder))


def _overlays(names: str) -> list[str]:
    """Recipes that go over the common ones, given by their names with commas between."""
    return [argument for name in names.split(",") for argument in ("--config", name)]


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        "kurtail compare",
        description=compare.__doc__,
        epilog="Other options override settings of every recipe, as in fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], help="recipes, one over the other, as in fit")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="RECIPE[,RECIPE...]",
        help="another line of the table: these recipes over the common ones",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="RECIPE",
        help="recipes for how weights are rounded, such as float, rtn, gptq, hqq; as the recipe says if not given",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of the rotations; the recipe's own if not given")
    parser.add_argument("--out", type=Path, help="folder of table, picture and recipes (comparisons/RECIPES)")
    parser.add_argument("--overwrite", choices=("true", "false"), default="false", help="make everything anew")
    options, others = parser.parse_known_args(prepared(arguments, ("--with",)))
    options.overwrite = options.overwrite == "true"
    return options, others
