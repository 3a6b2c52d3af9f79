"""What a page shows of one or more models: a section for each thing that their folders hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import TypeVar

from kurtail_pl.maths.kurtosis import UNIFORM_KURTOSIS
from kurtail_pl.stages.inspection.facts import facts_of
from kurtail_pl.stages.inspection.runtimes import verdicts
from kurtail_pl.stages.inspection.table import COLUMNS as RUNTIMES
from kurtail_pl.stages.reporting.figures.kurtosis import NORMAL_KURTOSIS
from kurtail_pl.stages.reporting.figures.style import BLOCKS, HADAMARD, VANILLA, title_of
from kurtail_pl.stages.reporting.page.charts import lines, ridges
from kurtail_pl.stages.reporting.page.errors import errors
from kurtail_pl.stages.reporting.page.model import Model
from kurtail_pl.stages.reporting.page.section import Listing, Page, Picture, Section, Table
from kurtail_pl.storage.files import gigabytes

LEVELS = {"uniform 1.8": UNIFORM_KURTOSIS, "normal 3": NORMAL_KURTOSIS}
SURFACES = 4
"""Sites that are drawn, before and after."""
SHORT = 12
"""Digits of a hash that are shown."""
V = TypeVar("V")


def page_of(title: str, models: Sequence[Model], chief: Model, first: Section, last: Section | None = None) -> Page:
    """The page of one model, or of those in a comparison.

    Args:
        title: of the page.
        models: whose folders are shown.
        chief: the one of them that the page is about.
        first: the table of methods.
        last: weights that were not quantized as the rest, if any.
    """
    drawn = next((model for model in (chief, *models) if model.figures.surfaces), chief)
    found = (
        training(models), kurtosis(models, chief), errors(chief, drawn), surfaces(drawn), cost(models), repeat(models),
        runtimes(chief), last,
    )  # fmt: skip
    facts = list(_facts(chief, best=len(models) > 1))
    return Page(title, facts, [first, *(section for section in found if section is not None)])


def _facts(model: Model, best: bool) -> Iterator[tuple[str, str]]:
    results = model.results
    if best:
        yield "best", model.name
    else:
        yield "model", results["model"]
        yield "method", results["method"]
    yield "perplexity", f"{results['evaluation']['perplexity']:.2f}"
    yield "mean kurtosis", f"{results['kurtosis']['mean']:.2f}"
    yield "on disk", gigabytes(results["disk_bytes"])


def training(models: Sequence[Model]) -> Section | None:
    """Curves of the loss and of the kurtosis: of one model all, of several one each."""
    learned = [model for model in models if model.curves]
    pictures = []
    for start, chosen, title in (
        ("loss/", "loss/total", "Loss"),
        ("kurtosis/", "kurtosis/r1/mean", "Kurtosis of training rows"),
    ):
        if len(learned) == 1:
            curves = {name: curve for name, curve in learned[0].curves.items() if name.startswith(start) and curve}
            if len(curves) > 1:
                curves.pop("loss/total", None)  # It lies on the largest of its parts.
            series = {_plain(name.removeprefix(start)): curve for name, curve in curves.items()}
        else:
            series = _distinct({model: model.curves.get(chosen, []) for model in learned})
        if series:
            pictures.append(lines(title, series, "step", start.rstrip("/")))
    about = (
        "R1 is the rotation of the residual stream, R2 those of the values. Where a curve is flat at its end, more "
        "steps would learn no more."
    )
    return Section("Training", about, pictures) if pictures else None


def _plain(name: str) -> str:
    """``r1/mean`` -> ``R1, mean``."""
    return name.replace("r1", "R1").replace("r2", "R2").replace("/", ", ")


def _distinct(values: Mapping[Model, V]) -> dict[str, V]:
    """What models have, without what is empty, and what several have once.

    It is named by their methods or, where others of the same methods have something else, by all their names.
    """
    owners: dict[str, list[Model]] = {}
    for model, value in values.items():
        if value:
            owners.setdefault(repr(value), []).append(model)
    by_method = [", ".join(dict.fromkeys(model.results["method"] for model in some)) for some in owners.values()]
    return {
        (label if by_method.count(label) == 1 else ", ".join(model.name for model in some)): values[some[0]]
        for label, some in zip(by_method, owners.values(), strict=True)
    }


def kurtosis(models: Sequence[Model], chief: Model) -> Section | None:
    """Of every block input, before and after."""
    drawn = {name: rows for name, rows in chief.figures.kurtosis.items() if rows} if len(models) == 1 else {}
    values = drawn or _distinct({model: model.sites for model in models})
    if not values:
        return None
    log = min(value for rows in values.values() for row in rows for value in row) > 0
    pictures = [
        lines(
            f"Kurtosis, input of {block}",
            {name: [(layer, row[place]) for layer, row in enumerate(rows)] for name, rows in values.items()},
            "layer", "kurtosis", log, LEVELS, dots=True,
        )
        for place, block in enumerate(BLOCKS.values())
    ]  # fmt: skip
    before = f" {VANILLA} is the model as it came, {HADAMARD} is rotated at random." if drawn else ""
    about = (
        f"How far the largest values of each block input stand out, on {chief.results['kurtosis']['rows']} rows kept "
        f"out of training. The lower it is, the better a 4-bit grid fits.{before}"
    )
    return Section("Kurtosis by layer", about, pictures)


def surfaces(model: Model) -> Section | None:
    """Magnitudes before and after, side by side on one scale."""
    pictures: list[Picture] = []
    for site, surface in list(model.figures.surfaces.items())[-SURFACES:]:
        limit = max((value for rows in surface.values() for row in rows for value in row), default=0.0)
        if limit > 0 and all(rows and all(rows) for rows in surface.values()):
            # In the colours that the methods have among the curves, where a random rotation is the second.
            pictures += [
                ridges(f"{name}, {title_of(site)}", rows, limit, 0 if name == VANILLA else 2)
                for name, rows in surface.items()
            ]
    about = (
        "Magnitudes of what a block reads, in units of each token's root mean square, before and after the learned "
        "rotation, on one scale. A 4-bit grid has to span the highest peak of a token."
    )
    return Section("Activations", about, pictures) if pictures else None


def cost(models: Sequence[Model]) -> Section:
    """Seconds and memory of every stage."""
    several = len(models) > 1
    rows = [
        [*([model.name] if several else []), stage, f"{spent['seconds']:.1f}", f"{spent['cpu_seconds']:.1f}",
         gigabytes(spent["peak_bytes"])]
        for model in models
        for stage, spent in model.results["cost"].items()
        if spent["seconds"]
    ]  # fmt: skip
    columns = [*(["model"] if several else []), "stage", "seconds", "CPU seconds", "peak memory"]
    return Section("Cost", "What each stage took, on the machine that ran it.", tables=[Table(columns, rows)])


def repeat(models: Sequence[Model]) -> Section | None:
    """What was run, with which versions, on what."""
    ours = [model for model in models if model.card]
    if not ours:
        return None
    commands = [f"kurtail fit --config {model.folder / 'recipe.yaml'} --overwrite" for model in ours if model.recipe]
    listings = [Listing("Commands", "\n".join(commands))] if commands else []
    listings += [
        Listing(f"recipe.yaml of {model.name}" if len(ours) > 1 else "recipe.yaml", model.recipe, closed=True)
        for model in ours
        if model.recipe
    ]
    columns = ["what", *(model.name for model in ours)] if len(ours) > 1 else ["what", "value"]
    identity = [_identity(model) for model in ours]
    names = dict.fromkeys(name for values in identity for name in values)
    rows = [[name, *(values.get(name, "-") for values in identity)] for name in names]
    about = (
        "A recipe holds every setting that was in force. The same versions on the same processor give the same numbers."
    )
    return Section("What was run", about, tables=[Table(columns, rows)], listings=listings)


def _identity(model: Model) -> dict[str, str]:
    """What has to be the same for the same numbers to come out."""
    card, evaluation = model.card, model.results["evaluation"]
    texts = {
        "source model": card["source"]["model"],
        "source weights, SHA-256": card["source"]["sha256"][:SHORT],
        "seed of the rotations": card.get("rotations", {}).get("seed"),
        "rounding": card.get("rounding"),
        "calibration text, SHA-256": str(card.get("calibration_text_sha256") or "")[:SHORT],
        "evaluation text, SHA-256": str(evaluation.get("text_sha256") or "")[:SHORT],
    }
    texts |= card.get("versions", {})
    return {name: str(value) for name, value in texts.items() if value not in (None, "")}


def runtimes(chief: Model) -> Section | None:
    """What each runtime makes of an artefact."""
    if not chief.card:
        return None
    rows = [list(astuple(verdict)) for verdict in verdicts(facts_of(chief.folder))]
    about = (
        f"What each runtime makes of the folder {chief.folder.name} as it stands. kurtail inspect says the same of an "
        "export."
    )
    return Section("Where it runs", about, tables=[Table(RUNTIMES, rows)])
