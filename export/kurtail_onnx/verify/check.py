"""`--check`: everything that is proven of an export; a failed proof is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import import_runtime
from kurtail_onnx.settings import Precision, Settings
from kurtail_onnx.verify.kernels import fused_linears, placement, trace
from kurtail_onnx.verify.layers import LayerAgreement, compare_layers
from kurtail_onnx.verify.structure import check_structure
from kurtail_onnx.verify.texts import TextAgreement, compare_texts, scenarios, windows
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.stages.export import small_enough
from kurtail_pl.surgery.linear import QuantizedLinear


@dataclass(frozen=True)
class Tolerance:
    """What an export may be off by. One value on a border always may fall on the other side, wherever it is.

    Args:
        logits: of the head, relative to the largest; of a rounded head one input more, on the border of two codes.
        codes: share of the cached codes that may be others, and the codes of one token more.
        tokens: share of the tokens that may hold a value rounded to another code, and half of one layer's more: all
            later tokens of a text read a key or value.
        layer: share of one layer's tokens that may.
    """

    logits: float
    codes: float
    tokens: float
    layer: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-5, 1e-4, 0.02, 0.75),
    "fp16": Tolerance(5e-3, 0.05, 1.0, 1.0),
}
"""In fp16 one value in a thousand lies on the border of two codes, so almost every token holds one."""
LOGITS, PERPLEXITY = 1e-5, 1e-4
"""What whole texts may be off by in fp64, where no value falls on the other side: logits, and perplexity relative."""


def check(folder: Path, source: Source, spec: Settings) -> dict[str, Any]:
    """Check an export: layer by layer, or in double over whole texts.

    Args:
        folder: of the export, finished.
        source: the artefact.
        spec: choices of the export.

    Returns:
        What is proven, for ``checks.json``.

    Raises:
        CheckFailed: when the file is not valid, a linear is not fused, or a layer or text is not torch's.
    """
    export = Export(folder)
    checks: dict[str, Any] = {"onnxruntime": import_runtime().__version__, "operators": check_structure(folder)}
    kernels = trace(export)
    checks["linears"] = {"quantized": _quantized_linears(source), "fused": fused_linears(kernels)}
    checks["placement"] = placement(kernels)
    todo = scenarios(source.config)
    if spec.dtype == "fp64":
        texts = compare_texts(export, source, spec, todo | windows(export, source))
        _require_equal(texts)
    else:
        _require_fused(**checks["linears"])
        layers, head = compare_layers(folder, source, spec)
        checks["layers"] = summary(layers) | {"head_logits_error": head.error, "head_logits_step": head.step}
        _require_agreement(checks["layers"], len(layers), TOLERANCES[spec.dtype])
        # Layers are compared one at a time; whole texts need all of the model in memory.
        texts = compare_texts(export, source, spec, todo) if small_enough(folder) else {}
    checks["texts"] = {name: asdict(agreement) for name, agreement in texts.items()}
    return checks


def _require_fused(quantized: int, fused: int) -> None:
    if fused != quantized:
        raise CheckFailed(
            f"{fused} of {quantized} quantized linears run in few bits; the others would be dequantized in every step: "
            "export with --to.weights matmulnbits, or use a newer onnxruntime"
        )


def _require_equal(texts: Mapping[str, TextAgreement]) -> None:
    for name, text in texts.items():
        # Not a number is no agreement.
        near = text.logits_error <= LOGITS and text.perplexity_error <= PERPLEXITY
        if text.codes_differing or not near:
            raise CheckFailed(
                f"the export does not compute the artefact's model: {name}: {text}; report it with its kurtail.json"
            )


def summary(layers: list[LayerAgreement]) -> dict[str, Any]:
    """All layers together."""
    return {
        "tokens": sum(layer.tokens for layer in layers),
        "tokens_on_a_border": sum(layer.tokens_on_a_border for layer in layers),
        "hidden_error": max(layer.hidden_error for layer in layers),
        "codes": sum(layer.codes for layer in layers),
        "codes_differing": sum(layer.codes_differing for layer in layers),
        "largest_code_difference": max(layer.largest_code_difference for layer in layers),
        "largest_share_of_a_layer": max(layer.tokens_on_a_border / layer.tokens for layer in layers),
    }


def _require_agreement(layers: dict[str, Any], count: int, tolerance: Tolerance) -> None:
    tokens, codes = layers["tokens"], layers["codes"]
    # Not a number is no agreement.
    agreements = [
        layers["head_logits_error"] <= tolerance.logits + layers["head_logits_step"],
        layers["codes_differing"] <= tolerance.codes * codes + codes / tokens,
        layers["tokens_on_a_border"] <= tolerance.tokens * tokens + tokens / count / 2,
        layers["largest_share_of_a_layer"] <= tolerance.layer,
    ]
    if not all(agreements):
        raise CheckFailed(
            f"the export does not compute the artefact's model: {layers}; report it with its kurtail.json"
        )


def _quantized_linears(source: Source) -> int:
    if source.scheme.weights is None:
        return 0
    return sum(isinstance(module, QuantizedLinear) for module in source.model.modules())
