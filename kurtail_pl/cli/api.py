"""`kurtail_pl.quantize`: what `kurtail fit` does, from Python."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kurtail_pl.cli.trainer import KurtailCLI, command_line
from kurtail_pl.lit.callbacks import WeightQuantization
from kurtail_pl.lit.callbacks.order import callback_of


def quantize(
    model: str | os.PathLike[str],
    recipe: str | Sequence[str] = (),
    text: str | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Path:
    """Capture, learn rotations, fuse, quantize and evaluate; returns the artefact folder, for `load` and the exports.

    Args:
        model: a name on the Hugging Face hub, a folder, a GGUF file, or ``smollm2-135m``.
        recipe: names of recipes (`kurtail recipes`) or YAML files, one over the other; none is KurTail with GPTQ.
        text: to learn from, by name or file; by default the embedded one.
        out: folder of the artefact; by default ``artifacts/MODEL-METHOD-BITS``.
        overrides: sections of a recipe: ``quantization={"rounder": {"percdamp": 0.05}}``, ``target="llama.cpp"``.

    Raises:
        KurtailError: of the kind that tells what is wrong, before any long work where that can be known.
    """
    recipes = [recipe] if isinstance(recipe, str) else recipe
    given = {"data.capture.model": model, "data.capture.text.source": text, "quantization.out": out}
    settings = {**{name: str(value) for name, value in given.items() if value is not None}, **dict(flat(overrides))}
    arguments = [f"--config={name}" for name in recipes]
    arguments += [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    ]
    before = sys.argv
    try:
        cli = command_line(KurtailCLI, "kurtail", ["fit", *arguments])
    finally:
        sys.argv = before
    quantization = callback_of(cli.trainer, WeightQuantization)
    assert quantization is not None
    return quantization.folder(cli.model, cli.datamodule)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
