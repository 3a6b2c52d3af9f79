"""Compare: the baselines of a recipe, made by the same code with the same settings, beside its own artefact."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kurtail_pl.errors import ArtefactError
from kurtail_pl.stages.fuse import UNROTATED, fuse
from kurtail_pl.stages.quantize import QuantizeSpec, quantize
from kurtail_pl.stages.report import report
from kurtail_pl.stages.results import FLOAT_METHOD, RESULTS, artefact_name, evaluate_folder, read_results
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.folder import is_ours, read_card
from kurtail_pl.surgery.rotations import Rotations, random_rotations
from kurtail_pl.surgery.scheme import FLOAT

log = logging.getLogger(__name__)


def run_baselines(
    checkpoint: Checkpoint,
    store: ActivationStore,
    spec: QuantizeSpec,
    text: TextSpec,
    validation_rows: int,
    rotation_seed: int,
    artefacts: Path,
    work: Path,
    overwrite: bool = False,
) -> None:
    """Make and measure what a recipe is compared with, each in its artefact folder; finished ones are reused.

    float (nothing quantized), RTN and GPTQ (no rotation), QuaRot (random Hadamards in place of the learned R1 and R2;
    weights as in the recipe).

    Args:
        checkpoint: the vanilla model.
        store: its activation store.
        spec: the recipe's quantization.
        text: the recipe's evaluation text.
        validation_rows: rows of the store on which kurtosis is measured.
        rotation_seed: of the random Hadamards; the recipe's own starts from the same ones.
        artefacts: folder of all artefacts.
        work: folder for the fused models in between.
        overwrite: make all of them anew.

    Raises:
        ArtefactError: when a folder stands there that was made with other settings.
    """
    model = store.origin.model
    reference = artefacts / artefact_name(model, FLOAT_METHOD, FLOAT)
    windows = cut_windows(checkpoint.tokenizer(), text, "evaluation")
    measured = {
        **asdict(windows.spec),
        "text_sha256": windows.text_sha256,
        "model_sha256": checkpoint.sha256,
        "kurtosis_rows": validation_rows,
    }
    if overwrite or not _reusable(reference, measured):
        reference.mkdir(parents=True, exist_ok=True)
        evaluate_folder(checkpoint, reference, text, store, validation_rows)
    for method, rotation_method, rotations, own in _methods(checkpoint, spec, rotation_seed):
        folder = artefacts / artefact_name(model, method, spec.scheme)
        made = {"quantize": asdict(own), **rotations.origin}
        if not overwrite and _reusable(folder, {**measured, **made}):
            log.info("reusing %s", folder)
            continue
        fused = work / f"fused-{rotation_method}"
        fuse(checkpoint, rotations, rotation_method, fused, overwrite=True)
        quantize(fused, own, folder, overwrite=True)
        evaluate_folder(Checkpoint(folder), folder, text, store, validation_rows)
        report(folder)


def _methods(
    checkpoint: Checkpoint, spec: QuantizeSpec, rotation_seed: int
) -> Iterator[tuple[str, str, Rotations, QuantizeSpec]]:
    """Name, name of the rotations, rotations and quantization of each baseline."""
    yield "rtn", UNROTATED, Rotations(), replace(spec, method="rtn")
    yield "gptq", UNROTATED, Rotations(), replace(spec, method="gptq")
    yield "quarot", "quarot", random_rotations(checkpoint.config, rotation_seed), spec


def _reusable(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds results of these settings; raises ArtefactError, naming one, when it holds others."""
    if not (folder / RESULTS).is_file():
        return False
    results = read_results(folder)
    card = read_card(folder) if is_ours(folder) else {}
    have = {**card, **card.get("rotations", {}), **results["measured"], **results["evaluation"]}
    for key, value in json.loads(json.dumps(wanted)).items():
        if have.get(key) != value:
            raise ArtefactError(
                f"{folder} was made or measured with other settings ({key} {have.get(key)!r}, wanted {value!r}); "
                "pass --overwrite, or remove it"
            )
    return True
