"""What the model card of an export says of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
    """Lines about what runs, what was proven, and how the file is run.

    Args:
        description: content of `kurtail_export.json`.
        checks: content of `checks.json`; None when the export was not checked.
    """
    kinds = ", ".join(f"{count} {kind}" for kind, count in description["tensors"].items())
    file = description["file"]
    return [
        *([] if checks is None else [*_proof(checks), ""]),
        f"Architecture `{description['architecture']}`, tensors: {kinds}. Codes and scales are the artefact's own.",
        "",
        "llama.cpp multiplies these weights with activations in int8, in blocks of 32 (on GPUs that have FP4, those in "
        "FP4 with activations in FP4), and keeps the cache as it is asked to: below in 4 bits, behind a Hadamard of "
        "its own. The perplexity that the artefact was evaluated with is that of its own quantizers.",
        "",
        *([f"- left out: {what}" for what in description["left_out"]] or ["Nothing of the artefact was left out."]),
        "",
        "```bash",
        f"llama-cli -m {file} -ctk q4_0 -ctv q4_0 -fa on",
        f"llama-server -m {file} -ctk q4_0 -ctv q4_0 -fa on",
        "```",
        "",
        "Without `-ctk` and `-ctv` the cache is in float16.",
    ]


def _proof(checks: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Read back by gguf {checks['gguf']}, {checks['equal_weights']} weights of linears and "
        f"{checks['equal_others']} other tensors are the artefact's bit for bit; relative to their largest number, "
        + ", ".join(f"{name} was rounded by up to {error:.1e}" for name, error in checks["largest_errors"].items())
        + "."
    ]
    ran = checks["llama.cpp"]
    if ran is None:
        return [*lines, "llama.cpp was not run."]
    return [
        *lines,
        f"llama.cpp (xllamacpp {ran['xllamacpp']}, CPU, float cache) makes the same tokens of "
        f"{ran['equal_texts']} texts. Behind {ran['equal_tokens']} of {ran['tokens']} tokens of one of them the "
        f"likeliest is that of torch with int8 activations; its logarithms of probabilities are {ran['error']:.1e} "
        f"from torch's (rms), which int8 activations move by {ran['int8_noise']:.1e}.",
    ]
