"""`--check`: everything that is proven of an export; a failed proof is an error."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import compressed_tensors

from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.export import small_enough
from kurtail_vllm.groups import form_of, linears_of
from kurtail_vllm.settings import Settings
from kurtail_vllm.transforms import transforms_of
from kurtail_vllm.verify.codes import compare_codes
from kurtail_vllm.verify.folder import Served
from kurtail_vllm.verify.texts import compare_logits, compare_tokens


def check(source: Source, spec: Settings, folder: Path) -> dict[str, Any]:
    """Read an export back, and compare codes, logits and, where transformers reads it rightly, greedy tokens.

    Args:
        source: the artefact.
        spec: choices of the export.
        folder: of the export, finished.

    Returns:
        What is proven, for ``checks.json``.

    Raises:
        CheckFailed: when the library refuses the configuration, or something is not the artefact's.
    """
    served = Served(folder)
    checks: dict[str, Any] = {
        "compressed_tensors": compressed_tensors.__version__,
        "codes": asdict(compare_codes(source, served, spec.torch_dtype)),
        "mirror": compare_logits(source, spec, served),
    }
    if _is_for_transformers(source, spec) and small_enough(folder):  # Which takes the whole model in memory.
        checks["transformers"] = compare_tokens(source, spec, str(folder))
    return checks


def _is_for_transformers(source: Source, spec: Settings) -> bool:
    """Whether transformers computes the same: it leaves transforms out, and loads no packed experts or zero points."""
    mixture = any(source.architecture.has_experts(layer) for layer in source.layers)
    forms = [form_of(linear, spec.activations) for _, linear in linears_of(source)]
    plain = all(form.activations is None and form.weights.symmetric for form in forms)
    return plain and not mixture and not transforms_of(source)
