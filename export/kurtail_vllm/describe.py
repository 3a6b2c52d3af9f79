"""How an export is run, as plain data for ``kurtail_export.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_vllm.forms import cache_of
from kurtail_vllm.groups import form_of, linears_of
from kurtail_vllm.settings import Settings
from kurtail_vllm.transforms import Transform, tensor_name

KERNEL = "Using HummingLinearKernel for CompressedTensorsWNA{bits}Int"
"""vLLM logs this line when the layers really read activations of few bits."""


def describe(source: Source, spec: Settings, transforms: Sequence[Transform]) -> dict[str, Any]:
    """What is quantized, by which kernel, and what its transforms cost.

    The command's folder is written FOLDER; there is none for float32, of which vLLM has no kernels. Multiplications are
    those of one token, of all decoder layers.
    """
    forms = {form_of(linear, spec.activations): None for _, linear in linears_of(source)}
    activations = sorted({form.activations.bits for form in forms if form.activations is not None})
    cache = cache_of(source.scheme.cache).dtype
    backend = ["--linear-backend", "humming"] if activations else []
    stored = [] if cache is None else ["--kv-cache-dtype", cache]
    command = ["vllm", "serve", "FOLDER", "--dtype", spec.dtype, *backend, *stored]
    linears = sum(linear.in_features * linear.out_features for _, linear in linears_of(source))
    return {
        "command": None if spec.dtype == "float32" else command,
        "log_lines": [KERNEL.format(bits=bits) for bits in activations],
        "forms": [
            {"weights": _words(form.weights), "activations": None if (q := form.activations) is None else _words(q)}
            for form in forms
        ],
        "cache": cache,
        "transforms": {
            transform.name: {
                "tensor": tensor_name(source, transform),
                "size": transform.factors.size,
                "block": transform.factors.block,
                "kernel": "hadacore" if transform.fast else "dense",
                "construction": transform.factors.construction,
            }
            for transform in transforms
        },
        "multiplications": {
            "linears": linears,
            "transforms": len(source.layers) * sum(transform.multiplications for transform in transforms),
        },
    }


def _words(quantizer: Quantizer) -> dict[str, Any]:
    return {"bits": quantizer.bits, "symmetric": quantizer.symmetric, "group_size": quantizer.group_size}
