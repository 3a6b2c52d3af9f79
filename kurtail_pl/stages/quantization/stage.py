"""Quantize: a fused model's weights to codes, layer by layer, into an artefact folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from kurtail_pl.artefact.skeleton import stored_bytes
from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.quantization.passes import Rounding, equipped
from kurtail_pl.stages.quantization.sensitivity import sensitivities
from kurtail_pl.stages.quantization.spec import QuantizeSpec, calibration_windows, require_fit, tuning_windows
from kurtail_pl.stages.text import Windows
from kurtail_pl.storage.card import read_card, require_intact, rotations_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import require_space
from kurtail_pl.storage.keys import folder_sha256, settings_key
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker

log = logging.getLogger(__name__)


def quantize(
    fused: Path,
    spec: QuantizeSpec,
    folder: Path,
    overwrite: bool = False,
    compute: Compute = AUTO,
    ranks: Ranks = ALONE,
) -> Path:
    """Write an artefact folder from a fused model.

    Args:
        fused: folder that `fuse` wrote.
        spec: scheme and method.
        folder: where the artefact goes.
        overwrite: replace the folder if it exists.
        compute: device and floating-point type of the layers that the calibration text goes through.
        ranks: the processes that share the calibration windows; all see the same folders, and the first writes. What
            needs no windows the first does alone, and the others return at once.

    Raises:
        ConfigError: when a group size does not divide the model's widths, it does not know a token of the prefix, or
            rotations act at run time that the target does not compute.
        ArtefactError: when `fused` is not a fused model or is damaged, or the folder exists.
        TextError: when the calibration text is too short.
        DiskFull: when the artefact does not fit.
    """
    if not spec.needs_inputs and spec.own_windows is None:
        if not ranks.leads:
            return folder
        ranks = ALONE
    fused_card = _fused_card(fused, ranks)
    checkpoint = Checkpoint(fused)
    require_fit(checkpoint.config, spec, compute)
    text, own_text = calibration_windows(checkpoint, spec), tuning_windows(checkpoint, spec)
    rotations = rotations_of(fused)
    spec.runtime.require_online(rotations.online, rotations.block_input is not None)
    model = equipped(checkpoint, spec.scheme if spec.quantized_activations else FLOAT, rotations)
    walker = Walker(checkpoint, model, compute.torch_dtype, compute.torch_device)
    # The weights and the parts that they are joined from.
    require_space(folder, 2 * stored_bytes(model, spec.scheme))
    recipe = _recipe(fused, spec, compute, text)
    with resumable_folder(folder, overwrite, recipe, ranks) as work:
        with Meter(work.state.get("cost")) as meter:
            scheme = spec.scheme
            if spec.bits is not None and scheme.weights is not None and text is not None:
                alphas = sensitivities(checkpoint, text.tokens, spec.seed, compute, work, ranks)
                scheme = replace(scheme, layer_bits=spec.bits.bits(scheme.weights, alphas))
            rounding = Rounding(walker, rotations, spec, scheme, ranks, work)
            rounding.run(text, own_text, meter)
        if ranks.leads:
            cost = {**fused_card["cost"], "quantize": meter.to_dict()}
            rounding.write_rest({**recipe, "quantize": spec.to_dict(), "cost": cost}, fused_card)
    log.info(
        "quantized to %s in %.0f s (%.0f CPU s)%s: %s",
        scheme.name, meter.seconds, meter.cpu_seconds, ranks.shared, folder,
    )  # fmt: skip
    return folder


def _recipe(fused: Path, spec: QuantizeSpec, compute: Compute, text: Windows | None) -> dict[str, Any]:
    """All that decides the artefact."""
    return {
        "fused_sha256": folder_sha256(fused),
        "quantize": settings_key(spec),
        "dtype": compute.dtype,
        "calibration_text_sha256": None if text is None else text.text_sha256,
    }


def _fused_card(fused: Path, ranks: Ranks) -> dict[str, Any]:
    """Card of a fused model; raises ArtefactError for anything else."""
    card = read_card(fused)
    if ranks.leads:
        require_intact(fused)
    if "quantize" in card:
        raise ArtefactError(f"{fused} is quantized already; give the folder that kurtail fuse wrote")
    return card
