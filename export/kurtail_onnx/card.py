"""What the model card of an export says of ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
    """Lines about the quantizers, what was proven, and how the folder is run.

    Args:
        description: content of `kurtail_export.json`.
        checks: content of `checks.json`; None when the export was not checked.
    """
    quantizers = [
        f"- {part}: " + ("float" if q is None else f"{q['bits']} bits, clip {q['clip']}")
        for part, q in description["quantizers"].items()
    ]
    if description["maps"] is not None:
        quantizers.append("- before the quantizers of activations and keys: a learned map at each place")
    if description["centre"] is not None:
        quantizers.append("- activations and attention_output: each channel's calibrated mean subtracted first")
    if description["side"] is not None:
        quantizers.append(f"- beside the weights: {description['side']['kept']}")
    if description["static_grids"] is not None:
        quantizers.append("- activations and attention_output: one calibrated grid for all tokens of each input")
    if description["prefix"] is not None:
        quantizers.append(f"- before every text: float keys and values of the tokens {description['prefix']['tokens']}")
    if description["key_centre"] is not None:
        quantizers.append("- keys: each channel's calibrated mean subtracted first, in the cache too")
    if description["head"] is not None:
        quantizers.append("- what the head reads: 8 bits in blocks of 32 too, rounded by the runtime")
    return [
        *([] if checks is None else [*_proof(checks), ""]),
        *quantizers,
        "",
        "Weights and cache are stored in few bits and the numbers are those of integer kernels; ONNX Runtime has "
        "no 4-bit by 4-bit product, so the speed is that of a model with quantized weights alone.",
        "",
        "```bash",
        'kurtail generate --onnx . --prompt "Once upon a time"',
        "```",
        "",
        "`kurtail_export.json` lists inputs, outputs, cache layout, quantizer formulas and session settings.",
    ]


def _proof(checks: Mapping[str, Any]) -> list[str]:
    linears, layers = checks["linears"], checks.get("layers")
    proof = [
        f"Checked with onnxruntime {checks['onnxruntime']}: {linears['fused']} of {linears['quantized']} quantized "
        "linears run in few bits."
    ]
    if layers is not None:
        proof.append(
            f"Layer by layer on torch's own inputs, {layers['codes_differing']} of {layers['codes']} cached codes "
            f"differ, hidden states by {layers['hidden_error']:.1e} relative, and {layers['tokens_on_a_border']} of "
            f"{layers['tokens']} tokens hold a value that was rounded to the next code, which changes all that follows "
            "in whole texts."
        )
    rows = [
        f"| {name} | {text['tokens']} | {text['equal_tokens']} | {text['logits_error']:.1e} | "
        f"{text['codes_differing']} of {text['codes']} | {text['perplexity_error']:.1e} |"
        for name, text in checks["texts"].items()
    ]
    if not rows:
        return proof
    return [
        *proof,
        "",
        "| text | tokens | before the first other code | their largest logit error | other codes | perplexity |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
