"""The files of an export that ONNX Runtime loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kurtail_onnx.describe import DATA, MODEL, describe
from kurtail_onnx.genai import GENAI, genai_config
from kurtail_onnx.graph.model import build_model
from kurtail_onnx.settings import Settings
from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.fusion.stage import copy_companions
from kurtail_pl.storage.files import require_space, write_json

INLINE_BYTES = 256
"""Initializers up to this size stay in the graph's own file."""


def write(source: Source, spec: Settings, folder: Path) -> dict[str, Any]:
    """Write an ONNX model of an artefact; weights pass through memory one tensor at a time.

    Args:
        source: the artefact.
        spec: precision, cache, form of the weights.
        folder: where ``model.onnx``, ``model.onnx.data``, the configuration and the tokenizer go.

    Returns:
        What a deployer in any language needs to know to run the graph.
    """
    model = build_model(source, spec)
    require_space(folder, sum(tensor.nbytes for tensor in weights_of(model)))
    save(model, folder)
    source.config.save_pretrained(folder)
    copy_companions(source.checkpoint, folder)
    if spec.kv == "float":
        write_json(folder / GENAI, genai_config(source))
    return describe(source, spec, model)


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
