"""`--check`: everything that is proven of an export, in `checks.json`; a failed proof is an error."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kurtail_onnx.describe import DATA
from kurtail_onnx.graph.source import Source
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import import_runtime
from kurtail_onnx.spec import ExportSpec
from kurtail_onnx.verify.kernels import fused_linears, placement, trace
from kurtail_onnx.verify.layers import LayerAgreement, compare_layers
from kurtail_onnx.verify.structure import check_structure
from kurtail_onnx.verify.texts import compare_texts
from kurtail_pl.errors import CheckFailed
from kurtail_pl.storage.files import write_json
from kurtail_pl.surgery.linear import QuantizedLinear

CHECKS = "checks.json"
LARGEST_BY_DEFAULT = 1_000_000_000
"""Bytes of weights up to which an export is checked when nobody says so."""

LOGITS_TOLERANCE = 1e-5
"""Of the head's logits in fp32, relative to the largest."""
CODES_DIFFERING, TOKENS_ON_A_BORDER = 1e-4, 0.02
"""Shares, in fp32, of the cached codes and of the tokens whose values may be rounded to the neighbouring code."""


def check(folder: Path, source: Source, spec: ExportSpec) -> dict[str, Any]:
    """Check an export and write `checks.json`.

    Args:
        folder: of the export, finished.
        source: the artefact.
        spec: choices of the export.

    Raises:
        CheckFailed: when the file is not valid, a linear is not fused, or, in fp32, a layer is not torch's.
    """
    export = Export(folder)
    checks: dict[str, Any] = {"onnxruntime": import_runtime().__version__, "operators": check_structure(folder)}
    kernels = trace(export)
    expected = _quantized_linears(source)
    checks["linears"] = {"quantized": expected, "fused": fused_linears(kernels)}
    checks["placement"] = placement(kernels)
    if checks["linears"]["fused"] != expected:
        raise CheckFailed(
            f"{checks['linears']['fused']} of {expected} quantized linears run in few bits; the others would be "
            "dequantized in every step: export with --weights matmulnbits, or use a newer onnxruntime"
        )
    layers, logits = compare_layers(folder, source, spec)
    checks["layers"] = summary(layers) | {"head_logits_error": logits}
    if spec.dtype == "fp32":
        _require_agreement(checks["layers"])
    checks["texts"] = {name: asdict(agreement) for name, agreement in compare_texts(export, source, spec).items()}
    write_json(folder / CHECKS, checks)
    return checks


def summary(layers: list[LayerAgreement]) -> dict[str, Any]:
    """All layers together."""
    return {
        "tokens": sum(layer.tokens for layer in layers),
        "tokens_on_a_border": sum(layer.tokens_on_a_border for layer in layers),
        "hidden_error": max(layer.hidden_error for layer in layers),
        "codes": sum(layer.codes for layer in layers),
        "codes_differing": sum(layer.codes_differing for layer in layers),
        "largest_code_difference": max(layer.largest_code_difference for layer in layers),
    }


def _require_agreement(layers: dict[str, Any]) -> None:
    failures = [
        layers["head_logits_error"] > LOGITS_TOLERANCE,
        layers["codes_differing"] > CODES_DIFFERING * layers["codes"],
        layers["tokens_on_a_border"] > TOKENS_ON_A_BORDER * layers["tokens"],
    ]
    if any(failures):
        raise CheckFailed(
            f"the export does not compute the artefact's model: {layers}; report it with its kurtail.json"
        )


def _quantized_linears(source: Source) -> int:
    if source.scheme.weights is None:
        return 0
    return sum(isinstance(module, QuantizedLinear) for module in source.model.modules())


def small_enough(folder: Path) -> bool:
    """Whether an export is checked when nobody says so."""
    return (folder / DATA).stat().st_size <= LARGEST_BY_DEFAULT
