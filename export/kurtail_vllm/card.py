"""What the model card of an export says of vLLM, and of other runtimes that read the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPUS = {4: "up to 8.9 (A100, L40S, RTX 3090 and 4090)", 8: "up to 9.0 (A100, H100, RTX 4090) and 12.0 (RTX 5090)"}
"""vLLM takes activations of few bits on these alone (`utils/humming/schema.py`, `check_and_fallback_input_schema`)."""


def notes(description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
    """Lines about what was proven, how the folder is run, and who reads it wrongly.

    Args:
        description: content of `kurtail_export.json`.
        checks: content of `checks.json`; None when the export was not checked.
    """
    return [
        *([] if checks is None else [*_proof(checks), ""]),
        *_command(description),
        *_activations(description),
        *_cache(description),
        *_transforms(description),
        *_others(description),
    ]


def _proof(checks: Mapping[str, Any]) -> list[str]:
    codes, mirror, reader = checks["codes"], checks["mirror"], checks.get("transformers")
    proof = [
        f"Read back with compressed-tensors {checks['compressed_tensors']}, all {codes['codes']} codes of "
        f"{codes['linears']} linears and their scales are the artefact's. vLLM's arithmetic, repeated in torch in "
        f"double, gives the artefact's logits within {mirror['logits_error']:.1e} relative; the cache is left float on "
        "both sides."
    ]
    if reader is not None:
        proof += [
            "",
            f"transformers {reader['transformers']} loads the folder and gives the same {reader['tokens']} greedy "
            "tokens.",
        ]
    return proof


def _command(description: Mapping[str, Any]) -> list[str]:
    command = description["command"]
    if command is None:
        return ["vLLM has no kernels of float32: export with `--to.dtype float16` to serve the model.", ""]
    return ["```bash", " ".join(command), "```", ""]


def _activations(description: Mapping[str, Any]) -> list[str]:
    lines = description["log_lines"]
    if not lines:
        return ["Weights alone are quantized: linears multiply by float activations.", ""]
    return [
        "vLLM multiplies by quantized activations only with `--linear-backend humming` (the package humming-kernels). "
        "Its log proves it:",
        "",
        "```",
        *lines,
        "```",
        "",
        "Without that option it chooses another kernel and leaves activations float, without a word.",
        *(
            f"vLLM 0.32 computes with activations of {bits} bits on GPUs of compute capability {GPUS[bits]}; on others "
            "it takes more bits or leaves them float, and says nothing."
            for bits in sorted({form["activations"]["bits"] for form in description["forms"]})
        ),
        "",
    ]


def _cache(description: Mapping[str, Any]) -> list[str]:
    if description["cache"] is None:
        return ["vLLM has no cache of the artefact's bits; keys and values are kept in the model's type.", ""]
    return [
        f"`--kv-cache-dtype {description['cache']}` has the bits of the artefact's cache, and a rule of its own: the "
        "grid of each token and head ends at its smallest and largest value. R3 is left out, which changes no score; "
        "in 4 bits vLLM rotates queries, keys and values by a Hadamard of its own.",
        "",
    ]


def _transforms(description: Mapping[str, Any]) -> list[str]:
    transforms = description["transforms"]
    if not transforms:
        return []
    count = description["multiplications"]
    sizes = ", ".join(f"{name} ({_size(each)})" for name, each in transforms.items())
    cost = count["transforms"] / count["linears"]
    return [
        f"Online rotations are `transform_config`: {sizes}. They cost {cost:.2g} times the multiplications of the "
        "linears. vLLM applies them on one GPU, neither tensor nor pipeline parallel.",
        "",
    ]


def _size(transform: Mapping[str, Any]) -> str:
    """In words."""
    channels, block = transform["size"], transform["block"]
    blocks = f"{channels} channels" + ("" if block == channels else f" in blocks of {block}")
    return f"{blocks}, {'a fast Hadamard kernel' if transform['kernel'] == 'hadacore' else 'a dense matrix'}"


def _others(description: Mapping[str, Any]) -> list[str]:
    if description["transforms"]:
        return [
            "**transformers, SGLang and llama.cpp's converter do not read `transform_config`: with them this folder "
            "prints garbage, without a warning.** Use vLLM, or export a model that was fused with `online: []`.",
        ]
    if description["log_lines"]:
        return ["transformers simulates the quantized activations; SGLang and llama.cpp's converter leave them float."]
    if not all(form["weights"]["symmetric"] for form in description["forms"]):
        return [
            "transformers 5.23 loads packed zero points only with "
            "`quantization_config=CompressedTensorsConfig(dequantize=True)`."
        ]
    return [
        "transformers and SGLang read this folder too, and llama.cpp's converter where all weights have groups of one "
        "size."
    ]
