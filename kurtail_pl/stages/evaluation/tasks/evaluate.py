"""Evaluate tasks: accuracy of a model folder, plain or made by KurTail, on the paper's benchmarks."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby
from math import sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kurtail_pl.artefact.load import load
from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.progress import track
from kurtail_pl.stages.evaluation.tasks.spec import MATHQA, MMLU, ZERO_SHOT, TaskSpec, chosen_tasks, files_of, split_of
from kurtail_pl.stages.meter import Meter, free_memory
from kurtail_pl.storage.card import is_ours, require_sound
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.keys import model_key, settings_key
from kurtail_pl.storage.resume import Workplace, resumable_work
from kurtail_pl.streaming.compute import Compute, Device
from kurtail_pl.surgery.equip import unpack_weights, unpacked_bytes

if TYPE_CHECKING:
    from kurtail_pl.stages.evaluation.tasks.harness import Part

log = logging.getLogger(__name__)


def evaluate_models(checkpoints: Sequence[Checkpoint], spec: TaskSpec, device: Device = "auto") -> list[dict[str, Any]]:
    """`evaluate_tasks` of several models; killed and run again, those that were finished are not repeated."""
    for checkpoint in checkpoints:
        require_sound(checkpoint.folder)
    recipes = [_recipe(checkpoint, spec) for checkpoint in checkpoints]
    with resumable_work({"models": recipes}) as work:
        finished: list[dict[str, Any]] = work.state.setdefault("finished", [])
        for checkpoint in checkpoints[len(finished) :]:
            finished.append(evaluate_tasks(checkpoint, spec, device))
            work.finished(len(finished))
    return finished


def evaluate_tasks(checkpoint: Checkpoint, spec: TaskSpec, device: Device = "auto") -> dict[str, Any]:
    """Accuracy of a model on tasks of the lm-evaluation-harness.

    Killed and run again, it goes on after the last finished task, for MMLU after the last finished subject.

    Args:
        checkpoint: model folder.
        spec: which tasks, on what rows.
        device: where the whole model goes, in float32.

    Returns:
        ``tasks``: for each its accuracies and standard errors as the harness computes them (``acc``; ``acc_norm``, by
        length of the answer, where it has it), ``metric`` (the one that is reported: acc_norm where there is one), its
        ``value`` and ``stderr``, ``split``, ``rows``, ``shots``, ``cut`` (inputs that lost their beginning to the
        model's context); MMLU also has its ``groups``. ``mean`` of the paper's
        eight 0-shot tasks and its ``mean_stderr``, ``mmlu`` and ``mathqa`` (None where they were not all run); what was
        ``skipped`` and why; the settings, the version of the ``harness`` and the ``cost``.

    Raises:
        ArtefactError: when KurTail made the folder and a file of it is missing or damaged.
        HarnessMissing: when the harness is not installed.
        TextError: when a local file is missing or not in the harness's format.
        ConfigError: when MMLU has fewer examples than asked for.
    """
    require_sound(checkpoint.folder)
    names, skipped = chosen_tasks(spec)
    for name, why in skipped.items():
        log.info("skipping %s: %s", name, why)
    from kurtail_pl.stages.evaluation.tasks.harness import parts_of

    parts = [part for name in names for part in parts_of(name, spec)]
    recipe = _recipe(checkpoint, spec)
    with resumable_work(recipe) as work, Meter(work.state.get("cost")) as meter:
        scores = _answer(checkpoint, parts, work, meter, Compute(device).torch_device)
    tasks = {name: _summary(name, spec, [p for p in parts if p.task == name], scores) for name in names}
    return {**_headline(tasks), "tasks": tasks, "skipped": skipped, **recipe, "cost": meter.to_dict()}


def _recipe(checkpoint: Checkpoint, spec: TaskSpec) -> dict[str, Any]:
    """All that decides the numbers."""
    return {**questions_key(spec), **model_key(checkpoint), "tokenizer_sha256": checkpoint.tokenizer_sha256()}


def questions_key(spec: TaskSpec) -> dict[str, Any]:
    """What is asked: settings, the harness's version, the content of local rows."""
    names, _ = chosen_tasks(spec)
    files = [] if spec.folder is None else [path for name in names for path in files_of(name, spec)]
    return {
        "settings": settings_key(spec),
        "harness": importlib.metadata.version("lm_eval"),
        "files_sha256": {f"{path.parent.name}/{path.name}": sha256_of(path) for path in files},
    }


def _answer(
    checkpoint: Checkpoint, parts: list[Part], work: Workplace, meter: Meter, device: torch.device
) -> dict[str, dict[str, float]]:
    """Sums of each part, those of an earlier, killed run included."""
    scores: dict[str, dict[str, float]] = work.state.setdefault("scores", {})
    left = [part for part in parts if part.name not in scores]
    if not left:
        return scores
    from kurtail_pl.stages.evaluation.tasks.harness import quiet
    from kurtail_pl.stages.evaluation.tasks.model import LoadedModel

    with quiet():
        loaded = cast(PreTrainedModel, cast(nn.Module, _load(checkpoint)).to(device))
    model = LoadedModel(loaded, deepcopy(checkpoint.tokenizer()))  # The harness changes its tokenizer.
    for name, own in groupby(left, key=lambda part: part.task):
        # One line of progress: over the questions, or over the subjects of MMLU.
        model.label = "" if name == MMLU else name
        for part in track(list(own), name) if name == MMLU else own:
            requests = part.requests()
            answers = model.loglikelihood(requests, disable_tqdm=True)
            scores[part.name] = {**part.score(requests, answers), "cut": model.cut}
            work.state["cost"] = meter.to_dict()
            work.finished(len(scores))
    return scores


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model in float32; packed weights become floats once, rather than at each use, where memory allows it."""
    if not is_ours(checkpoint.folder):
        return whole_model(checkpoint)
    model = load(checkpoint.folder)
    free = free_memory()
    if free is None or 2 * unpacked_bytes(model) < free:
        unpack_weights(model)
    return model


def _summary(name: str, spec: TaskSpec, parts: list[Part], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    figures = _accuracies([scores[part.name] for part in parts])
    metric = "acc_norm" if "acc_norm" in figures else "acc"
    found = {
        **figures,
        "metric": metric,
        "value": figures[metric],
        "stderr": figures[f"{metric}_stderr"],
        "split": split_of(name),
        "shots": spec.mmlu_shots if name == MMLU else 0,
        "cut": sum(scores[part.name]["cut"] for part in parts),
    }
    if found["cut"]:
        log.warning("%s: %d inputs are longer than the model's context and lost their beginning", name, found["cut"])
    if name == MMLU:
        groups: dict[str, list[dict[str, float]]] = {}
        for part in parts:
            groups.setdefault(str(part.group), []).append(scores[part.name])
        found["groups"] = {group: _accuracies(sums) for group, sums in groups.items()}
    return found


def _accuracies(sums: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over all rows of some parts.

    The scores are zeros and ones: of n with mean p the sample's standard error is ``sqrt(p (1 - p) / (n - 1))``; None
    for a single row.
    """
    rows = int(sum(part["rows"] for part in sums))
    found: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if metric in sums[0]:
            mean = sum(part[metric] for part in sums) / rows
            found[metric] = mean
            found[f"{metric}_stderr"] = sqrt(mean * (1 - mean) / (rows - 1)) if rows > 1 else None
    return {**found, "rows": rows}


def _headline(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The paper's three columns."""
    eight = [tasks[name] for name in ZERO_SHOT if name in tasks]
    whole = len(eight) == len(ZERO_SHOT)
    errors = [task["stderr"] for task in eight]
    return {
        "mean": sum(task["value"] for task in eight) / len(eight) if whole else None,
        "mean_stderr": sqrt(sum(e**2 for e in errors)) / len(eight) if whole and None not in errors else None,
        "mmlu": tasks[MMLU]["value"] if MMLU in tasks else None,
        "mathqa": tasks[MATHQA]["value"] if MATHQA in tasks else None,
    }
