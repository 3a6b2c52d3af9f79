"""`kurtail inspect`: where a file runs."""

from __future__ import annotations

from pathlib import Path

from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.usage import OneLineParser


def inspect(arguments: list[str]) -> None:
    """Say what a folder or file computes with, and what each runtime makes of it."""
    parser = OneLineParser("kurtail inspect", description=inspect.__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="an artefact, an export, a GGUF file, or a model's folder")
    options = parser.parse_args(prepared(arguments))
    from kurtail_pl.stages.inspection.table import inspection

    print(inspection(options.path))
