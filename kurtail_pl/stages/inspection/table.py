"""The table that `kurtail inspect` prints."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

from kurtail_pl.stages.inspection.facts import FLOAT, facts_of
from kurtail_pl.stages.inspection.runtimes import verdicts
from kurtail_pl.stages.tables import markdown

COLUMNS = ("Runtime", "Result", "Why, or what to do", "Weights", "Activations", "Cache", "Rotations")


def inspection(path: Path) -> str:
    """What a file holds, and a row for each runtime.

    Raises:
        ArtefactError: see `facts_of`.
        CheckpointError: see `facts_of`.
    """
    facts = facts_of(path)
    rotations = "none at run time" if not facts.online else f"{', '.join(facts.online)} at run time"
    parts = {"weights": facts.weights, "activations": facts.activations, "cache": facts.cache, "rotations": rotations}
    said = [f"{path}: {facts.kind}", *(f"- {part} {what}" for part, what in parts.items())]
    if facts.family is not None:
        said.append(f"- {facts.family}")
    if facts.own:
        said.append(f"- beside the quantizers: {', '.join(facts.own)}")
    if facts.kind == "artefact" and {facts.weights, facts.activations, facts.cache} == {FLOAT}:
        said.append("- not quantized yet: kurtail quantize --artefact does that")
    return "\n".join([*said, "", markdown(COLUMNS, [astuple(verdict) for verdict in verdicts(facts)])])
