"""`kurtail export`: an artefact to the files of another runtime, by one of the exporters that packages declare.

They are entry points: a package of anyone's adds one, and nothing here names it. Installed metadata is as old as the
last installation; a checkout's own is its `pyproject.toml`, which is asked too.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.failures import UsageError
from kurtail_pl.cli.usage import OneLineParser, SettingsParser, late_errors_explained
from kurtail_pl.errors import RuntimeUnusable, shortened
from kurtail_pl.stages import export as stage

GROUP, OURS = "kurtail.exporters", "kurtail-pl"
CHECKOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"
DEFAULT = "onnx"


def export(arguments: list[str]) -> None:
    """Write an artefact as another runtime's files, and check them."""
    chosen = OneLineParser("kurtail export", add_help=False, allow_abbrev=False)
    chosen.add_argument("--to", default=DEFAULT)
    given, rest = chosen.parse_known_args(prepared(arguments))
    kind = exporter_named(given.to)
    names = ", ".join(f"{name} (by default)" if name == DEFAULT else name for name in exporters())
    parser = SettingsParser("kurtail export", description=f"{export.__doc__} --to NAME: {names}.")
    parser.add_argument("--config", action="config", help="a file with settings of these options")
    parser.add_function_arguments(stage.export, as_group=False, skip={"exporter"})
    parser.add_class_arguments(kind, "to")
    with late_errors_explained():
        made = parser.instantiate(parser.parse_args(rest))
    stage.export(made.artefact, made.out, made.to, made.check, made.overwrite, made.force)


def exporters() -> dict[str, EntryPoint]:
    """Where each exporter is, by the name that ``--to`` takes."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    project = tomllib.loads(CHECKOUT.read_text(encoding="utf-8"))["project"] if CHECKOUT.is_file() else {}
    if project.get("name") == OURS:
        found |= {name: EntryPoint(name, place, GROUP) for name, place in project["entry-points"][GROUP].items()}
    return dict(sorted(found.items()))


def exporter_named(name: str) -> type[Exporter]:
    """The class of an exporter.

    Raises:
        RuntimeUnusable: when a package that it needs is not installed.
        UsageError: when there is none of that name, with the one that is most like it.
    """
    known = exporters()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        like = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"to is {shortened(name, 60)}, expected one of {', '.join(known)}{like}")
    point = known[name]
    try:
        kind: type[Exporter] = point.load()
    except ModuleNotFoundError as missing:
        package = point.dist.name if point.dist else OURS
        raise RuntimeUnusable(
            f"the export to {name} needs the package {missing.name}; run: pip install '{package}[{name}]'"
        ) from missing
    return kind
