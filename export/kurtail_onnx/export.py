"""`kurtail export`: an artefact folder to a folder that ONNX Runtime loads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import onnx_ir as ir

from kurtail_onnx.card import CARD, card
from kurtail_onnx.describe import DATA, DESCRIPTION, MODEL, describe
from kurtail_onnx.genai import GENAI, genai_config
from kurtail_onnx.graph.model import build_model
from kurtail_onnx.spec import ExportSpec
from kurtail_onnx.verify.check import check, small_enough
from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.fusion.stage import copy_companions
from kurtail_pl.stages.meter import Meter
from kurtail_pl.storage.files import gigabytes, new_folder, refuse_existing, require_space, write_json, write_text

log = logging.getLogger(__name__)

INLINE_BYTES = 256
"""Initializers up to this size stay in the graph's own file."""


def export(
    artefact: Path, folder: Path, spec: ExportSpec, checked: bool | None = None, overwrite: bool = False
) -> Path:
    """Write an ONNX model of an artefact; weights pass through memory one tensor at a time.

    Args:
        artefact: what `kurtail fit`, `fuse` or `quantize` wrote.
        folder: where ``model.onnx``, ``model.onnx.data``, ``kurtail_export.json`` and the tokenizer go.
        spec: precision, cache, form of the weights.
        checked: prove the export equal to the artefact, and keep nothing if it is not; None proves small ones.
        overwrite: replace the folder if it exists.

    Raises:
        ArtefactError: when the artefact is damaged or of a newer format, or the folder exists.
        CheckFailed: when a proof fails.
        ConfigError: when the scheme cannot be said in ONNX.
        DiskFull: when the export does not fit.
        UnsupportedArchitecture: when the family, or a part of it, has no graph.
    """
    refuse_existing(folder, overwrite)
    source = Source(artefact)
    with Meter() as meter, new_folder(folder, overwrite) as partial:
        model = build_model(source, spec)
        require_space(folder, sum(tensor.nbytes for tensor in weights_of(model)))
        save(model, partial)
        source.config.save_pretrained(partial)
        copy_companions(source.checkpoint, partial)
        if spec.kv == "float":
            write_json(partial / GENAI, genai_config(source))
        description = describe(source, spec, model, partial)
        write_json(partial / DESCRIPTION, description)
        wanted = small_enough(partial) if checked is None else checked
        checks = check(partial, source, spec) if wanted else None
        write_text(partial / CARD, card(folder.name, description, checks))
    size, peak = gigabytes((folder / DATA).stat().st_size), gigabytes(meter.peak_bytes)
    log.info("exported %s to %s in %.0f s (%s of weights, peak memory %s)", artefact, folder, meter.seconds, size, peak)
    return folder


def weights_of(model: ir.Model) -> list[ir.TensorProtocol]:
    """The initializers of a model."""
    values = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in values if tensor is not None]


def save(model: ir.Model, folder: Path) -> None:
    """Write graph and weights; readable by all, as any other file of the folder."""
    for tensor in weights_of(model):
        if tensor.nbytes <= INLINE_BYTES:
            tensor.numpy()  # An error raised here would come out of the serializer as one of its own.
    ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=INLINE_BYTES)
    os.chmod(folder / DATA, 0o644)
