"""Results of a model folder: perplexity, kurtosis of the block inputs, cost; `results.json` and the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, with_config
from torch import Tensor

from kurtail_pl.errors import ArtefactError, ConfigError, StoreMismatch
from kurtail_pl.maths.kurtosis import kurtosis, rms_norm
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.evaluation.tasks.evaluate import evaluate_tasks
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import AGAIN as CAPTURE_AGAIN
from kurtail_pl.storage.activations import COST, ActivationStore, Origin, block_sites
from kurtail_pl.storage.card import is_ours, read_card, require_sound, rotations_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of_text, write_json
from kurtail_pl.storage.keys import model_key
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.records import OTHERS_TOO, Number, fields_of, read_object
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.rotations import Rotations

RESULTS = "results.json"
FLOAT_METHOD = "float"
AGAIN = "remove it and run kurtail eval again"


def artefact_name(model: str, method: str, bits: str) -> str:
    """Folder name of an artefact, such as ``smollm2-135m-kurtail-w4a4kv4``."""
    return f"{model_name(model)}-{method}-{bits}"


def model_name(model: str) -> str:
    """Short name of a model for folders, from its name on the hub, its folder or its file."""
    return Path(model).name.lower().removesuffix(".gguf")


def block_kurtosis(store: ActivationStore, rotations: Rotations, start: int, stop: int, eps: float) -> Tensor:
    """Kurtosis of each normed block input, rotated or not, over rows ``[start, stop)``: ``[2 layers]``, float64."""
    values = []
    for place, site in enumerate(block_sites(store.shape.layers)):
        rows = rms_norm(store.read(site, start, stop).double(), eps)
        values.append(kurtosis(rotations.turn_input(rows, place).flatten()))
    return torch.stack(values)


def evaluate_folder(
    checkpoint: Checkpoint,
    folder: Path,
    text: TextSpec,
    store: ActivationStore,
    validation_rows: int,
    tasks: TaskSpec | None = None,
    compute: Compute = AUTO,
) -> dict[str, Any]:
    """Measure a model and write `results.json`; what tasks gave earlier is kept when none are asked for.

    Args:
        checkpoint: what to measure: an artefact folder, or a plain model for the float reference.
        folder: where the results go.
        text: evaluation text.
        store: activation store of the vanilla model.
        validation_rows: its last rows, on which the kurtosis of the block inputs is measured.
        tasks: of the lm-evaluation-harness, if any.
        compute: device and floating-point type of the text's perplexity; tasks are answered there in float32.

    Raises:
        ArtefactError: when a file of the model's folder is missing or damaged.
        StoreMismatch: when one of the store is.
    """
    store.require_intact()
    require_sound(checkpoint.folder)
    card: dict[str, Any] = {"method": FLOAT_METHOD, "scheme": FLOAT.to_dict(), "cost": {}}
    if is_ours(checkpoint.folder):
        card = read_card(checkpoint.folder)
    _require_rows_of(store, checkpoint, card, validation_rows)
    kurtosis = _kurtosis(checkpoint, store, validation_rows)
    measured = perplexity(checkpoint, text, compute)
    answers = None if tasks is None else evaluate_tasks(checkpoint, tasks, compute.device)
    results = {
        "method": card["method"],
        "model": store.origin.model,
        "measured": measured_key(store.origin, validation_rows),
        "scheme": card["scheme"],
        "evaluation": measured,
        "kurtosis": kurtosis,
        "disk_bytes": checkpoint.size,
        "cost": {**_learning_cost(card, store), **card["cost"], "evaluate": measured.pop("cost")},
    }
    with alone_with(folder / RESULTS):
        earlier = read_results(folder).get("tasks") if (folder / RESULTS).is_file() else None
        if answers is not None:
            results["tasks"] = answers
        elif earlier is not None and model_key(checkpoint).items() <= earlier.items():
            results["tasks"] = earlier
        # Only now: results without the tasks would pass for results of other settings.
        write_json(folder / RESULTS, results)
    return results


def _learning_cost(card: dict[str, Any], store: ActivationStore) -> dict[str, Any]:
    """What learning an artefact's rotations took, and the capture of what they were learned from."""
    rotations, path = card.get("rotations", {}), store.folder / COST
    data, found = rotations.get("data"), {}
    if rotations.get("steps") and isinstance(data, dict) and "activations" in data and path.is_file():
        found["capture"] = read_object(path, StoreMismatch, CAPTURE_AGAIN)
        fields_of(found["capture"], _Cost, path, StoreMismatch, CAPTURE_AGAIN)
    return {**found, **({"learn": rotations["cost"]} if rotations.get("cost") else {})}


def _require_rows_of(
    store: ActivationStore, checkpoint: Checkpoint, card: dict[str, Any], validation_rows: int
) -> None:
    """Raise StoreMismatch when a store is another model's, ConfigError when it has too few rows."""
    source = card["source"]["sha256"] if "source" in card else checkpoint.sha256
    if store.origin.model_sha256 != source:
        raise StoreMismatch(
            f"the store {store.folder} holds activations of another model than {checkpoint.folder} was made from; "
            "name the store of that model, or capture one"
        )
    if not 0 < validation_rows <= store.origin.rows:
        raise ConfigError(
            f"validation_rows is {validation_rows}; the store {store.folder} has {store.origin.rows} rows: ask for "
            "fewer"
        )


def _kurtosis(checkpoint: Checkpoint, store: ActivationStore, validation_rows: int) -> dict[str, Any]:
    """Of the block inputs, on the store's last rows."""
    rows, eps = store.origin.rows, checkpoint.config.rms_norm_eps
    per_site = block_kurtosis(store, rotations_of(checkpoint.folder), rows - validation_rows, rows, eps)
    return {
        "mean": per_site.mean().item(),
        "max": per_site.max().item(),
        "rows": validation_rows,
        "sites": dict(zip(block_sites(store.shape.layers), per_site.tolist(), strict=True)),
    }


def measured_key(origin: Origin, validation_rows: int) -> dict[str, Any]:
    """Of what model and on which rows a kurtosis is measured."""
    rows_sha256 = sha256_of_text(json.dumps(origin.key, sort_keys=True))
    return {"model_sha256": origin.model_sha256, "kurtosis_rows": validation_rows, "rows_sha256": rows_sha256}


def add_tasks(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Put what `evaluate_tasks` found into a folder's `results.json`, beside what is there; returns all of it."""
    with alone_with(folder / RESULTS):
        results = {**(read_results(folder) if (folder / RESULTS).is_file() else {}), "tasks": found}
        write_json(folder / RESULTS, results)
    return results


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Origin:
    model_sha256: str


@with_config(OTHERS_TOO)
@dataclass(frozen=True)
class _Cost:
    seconds: Number
    cpu_seconds: Number
    peak_bytes: Number


@dataclass(frozen=True)
class _Measured:
    """What tables read of results, beside tasks."""

    method: str
    model: str
    measured: _Origin
    scheme: Scheme
    evaluation: dict[str, Any]
    kurtosis: dict[str, Any]
    disk_bytes: int
    cost: Annotated[dict[str, _Cost], Field(min_length=1)]


@dataclass(frozen=True)
class _Evaluation:
    perplexity: Number
    source: str
    windows: int
    seqlen: int
    tokens: int


@dataclass(frozen=True)
class _Kurtosis:
    mean: Number
    max: Number
    rows: int
    sites: dict[str, Number]


@dataclass(frozen=True)
class _WithTasks:
    tasks: dict[str, Any]


@dataclass(frozen=True)
class _Tasks:
    tasks: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    harness: str
    files_sha256: dict[str, str]
    skipped: dict[str, str]
    mean: float | None = None
    mmlu: float | None = None
    mathqa: float | None = None


def read_results(folder: Path) -> dict[str, Any]:
    """Read `results.json`: what a text gave, what tasks gave, or both.

    Raises:
        ArtefactError: when there is none, or what it holds cannot be shown.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ArtefactError(f"{folder} has no results; run kurtail eval on it with --text and --store")
    results = read_object(path, ArtefactError, AGAIN)
    if "evaluation" in results or "tasks" not in results:
        measured = fields_of(results, _Measured, path, ArtefactError, AGAIN)
        fields_of(measured.evaluation, _Evaluation, path, ArtefactError, AGAIN)
        fields_of(measured.kurtosis, _Kurtosis, path, ArtefactError, AGAIN)
    if "tasks" in results:
        fields_of(results, _WithTasks, path, ArtefactError, AGAIN)
        fields_of(results["tasks"], _Tasks, path, ArtefactError, AGAIN)
    return results
