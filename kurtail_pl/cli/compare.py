"""`kurtail compare`: recipes, their baselines, seeds and ways to round weights, each made by `fit`, in one table."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.cli.arguments import spelled
from kurtail_pl.cli.cells import BASELINES, Cell, cells_of, order_of_making
from kurtail_pl.cli.export import exporter_named, exporters
from kurtail_pl.cli.failures import UsageError
from kurtail_pl.cli.making import Maker, default_folder, recipe_of
from kurtail_pl.cli.systems import groups_of, named_systems, overlays, systems_of
from kurtail_pl.cli.usage import OneLineParser
from kurtail_pl.errors import RuntimeUnusable
from kurtail_pl.stages.reporting.comparison import write_comparison
from kurtail_pl.stages.reporting.lines import Row
from kurtail_pl.stages.reporting.serving import serving_of
from kurtail_pl.storage.lock import alone_with


def compare(arguments: list[str]) -> None:
    """Run recipes, their baselines and seeds, and print one table."""
    options, overrides = _options(arguments)
    groups = groups_of(options.config)
    files = [file for group in groups for some in group for file in some]
    maker = Maker(options.out or default_folder(files), options.overwrite)
    systems = named_systems(groups)
    refused: dict[str, str] = {}
    if systems and options.others:
        raise UsageError("--with stands beside a --config of several recipes; name all systems after that --config")
    if systems:
        cells, refused = systems_of(systems, overrides, options.weights, options.seeds, maker)
    else:
        cells = _with_baselines(files, options, overrides)
    rows = _made(cells, maker)
    with alone_with(maker.folder):
        print(write_comparison(rows, maker.folder, partial(serving_of, exporters=_exporters()), refused))


def _with_baselines(files: list[str], options: argparse.Namespace, overrides: list[str]) -> list[Cell]:
    """Those of one recipe, of what goes over it, and of the baselines of the first."""
    common = overlays(files)
    recipes = [
        recipe_of([*common, *overrides], options.weights or BASELINES),
        *(
            recipe_of([*common, *overlays(names.split(",")), *overrides], options.weights or [])
            for names in options.others
        ),
    ]
    return list(cells_of(recipes, options.weights, options.seeds))


def _made(cells: list[Cell], maker: Maker) -> list[Row]:
    """The float model, and every cell in its order, whatever was made first."""
    made: dict[int, Row] = {}
    reference: list[Row] = []
    for number in order_of_making(cells):
        parsed = maker.parse(cells[number])
        made[number] = maker.make(parsed)
        reference = reference or [maker.measure_float(parsed)]
    return [*reference, *(made[number] for number in range(len(cells)))]


def _exporters() -> dict[str, Exporter | str]:
    """One for each runtime, as it is without options, or why there is none."""
    found: dict[str, Exporter | str] = {}
    for name in exporters():
        try:
            found[name] = exporter_named(name)()
        except RuntimeUnusable as missing:
            found[name] = str(missing)
    return found


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        "kurtail compare",
        description=compare.__doc__,
        epilog="Other options override settings of every recipe, as in fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        nargs="+",
        default=[],
        metavar="RECIPE[,RECIPE...]",
        help="recipes, one over the other, as in fit; several after one --config are as many systems, a row for each",
    )
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="RECIPE[,RECIPE...]",
        help="beside a single recipe and its baselines another line: these recipes over it",
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
    options, others = parser.parse_known_args(spelled(arguments, ("--with",)))
    options.overwrite = options.overwrite == "true"
    return options, others
