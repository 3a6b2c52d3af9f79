"""ONNX's part of `kurtail_export.json`: what a deployer in any language needs to know to run the graph."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from kurtail_onnx.forms import cache_integers_of, weight_integers_of
from kurtail_onnx.graph.builder import IR_VERSION, OPSET
from kurtail_onnx.graph.cache import CachePart
from kurtail_onnx.graph.head import ROUNDED
from kurtail_onnx.graph.model import cache_parts
from kurtail_onnx.profiles import PROFILES
from kurtail_onnx.settings import Settings
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.surgery.positions import positions_of, rotary_border

MODEL, DATA = "model.onnx", "model.onnx.data"
ROTATIONS = {
    "residual": ("R1", "fused into the weights"),
    "value": ("R2", "fused into the weights"),
    "query_key": ("R3", "node query_key_R3/Hadamard on all heads of queries and keys after the rotary embedding"),
    "attention_output": ("R4", "node attention_output_R4/Hadamard on the input of the output projection"),
    "mlp_hidden": ("R5", "node mlp_hidden_R5/Hadamard on the input of the down projection"),
    "dense_hidden": ("R5", "node dense_hidden_R5/Hadamard on the input of a mixture's dense layers' down projection"),
}

MAPS = {
    "formula": ["X = x as a rows of b", "x = left.T @ X @ right, its rows one behind the other"],
    "where": "nodes transform/MatMul on the input of the linears, after R4 or R5 and before centre and quantizer, "
    "whatever --to.act is; nodes key_transform/MatMul on queries and on new keys after the rotary embedding and R3, of "
    "which that of the queries is the transposed inverse, so that scores stay",
    "tensors": "<linear>.transform.left, stored transposed, and .right, unless it is the identity, or, of few channels,"
    " .dense, their Kronecker product, all of the first linear that reads the input; <attention>.key_transform and "
    "<attention>.query_transform, head_dim x head_dim",
}
"""What learned maps do; the weights hold their inverses."""

CENTRE = {
    "formula": ["x = x - centre", "y = quantized(x) @ weight.T + bias"],
    "where": "node centre/Sub on the input of the linears, after R4 or R5 and before the quantizer, whatever --to.act "
    "is",
    "tensors": "<linear>.centre of the first linear that reads the input, and <linear>.bias, which holds "
    "centre @ weight.T of the weight before it was rounded",
}
"""How inputs are centred; `quantized` is what the quantizer of activations does, if there is one."""

SIDE = {
    "formula": ["y = quantized(x) @ weight.T + bias + (x @ down.T) @ up.T"],
    "where": "nodes side/MatMul on the input of the linears, after the centre and before the quantizer, whatever "
    "--to.act is, and side/MatMul and side/Add behind each linear",
    "tensors": "<linear>.side_down, rank x in, of the first linear that reads the input, and <linear>.side_up, out x "
    "rank, both stored transposed",
}
"""What a side of low rank adds."""

KEY_CENTRE = {
    "formula": ["key = key - key_centre"],
    "where": "node key_centre/Sub on new keys, after the rotary embedding and R3 and before the quantizer; scores of a "
    "query with all keys move alike, which the softmax does not notice, so nothing is added back",
    "tensors": "<attention>.key_centre, kv_heads x 1 x head_dim",
}
"""How keys are centred."""

PREFIX = {
    "where": "nodes prefix/Concat on keys and values behind the cache; cache, attention_mask and position_ids are of "
    "the text alone, whose positions begin at 0",
    "tensors": "<attention>.prefix_key, less key_centre if there is one, and <attention>.prefix_value, kv_heads x "
    "tokens x head_dim",
}
"""Where keys and values are that stand before those of every text."""

LONGROPE = (
    "texts of more tokens than border have other angles, from their first token on, which the graph takes where "
    "position_ids go beyond: before a text grows over the border, make its cache anew from all of its tokens at once"
)
"""What a runner has to do where a text crosses the border of longrope, as transformers does for Phi-3."""

HEAD = {
    "formula": ["x = code * scale of each 32 channels, as the head's own in quantizers", "logits = x @ weight.T"],
    "where": "node MatMulNBits of the head, at its accuracy level 4, whatever the session's entries are",
    "tensors": "<head>.weight.codes, vocabulary x blocks x 32, code + 128, and <head>.weight.scale, one for each block",
}
"""How a rounded head multiplies."""

STATIC_GRIDS = {
    "where": "nodes act_q/QuantizeLinear, act_q/DequantizeLinear and act_q/Mul on the input of the linears, after the "
    "centre is subtracted, with constants; with --to.weights integer act_q/Div to act_q/Cast",
    "tensors": "<linear>.input_scale and, with a zero point, <linear>.input_zero_point of the first linear that reads "
    "the input, scalars",
}
"""How inputs of linears are quantized whose grid does not depend on the token."""


def describe(source: Source, spec: Settings, model: ir.Model) -> dict[str, Any]:
    """The description of a graph.

    Args:
        source: the artefact.
        spec: choices of the export.
        model: its graph.
    """
    scheme, border = source.scheme, rotary_border(source.config)
    return {
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "model": {
            "model_type": source.config.model_type,
            "layers": len(source.layers),
            "kv_heads": source.kv_heads,
            "head_dim": source.head_dim,
            "vocab_size": source.config.vocab_size,
            "positions": positions_of(source.config),
            "eos_token_ids": eos_of(source),
        },
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "cache": {part.name: _cache(part, source) for part in cache_parts(source, spec)},
        "maps": None if source.maps is None else {"learned": source.maps, **MAPS},
        "centre": CENTRE if scheme.centre else None,
        "side": None if scheme.side is None else {"kept": scheme.side.sentence(), **SIDE},
        "key_centre": KEY_CENTRE if scheme.centre_keys else None,
        "prefix": None if scheme.prefix is None else {"tokens": scheme.prefix, **PREFIX},
        "longrope": None if border is None else {"border": border, "where": LONGROPE},
        "head": HEAD if spec.head == "int8" else None,
        "static_grids": STATIC_GRIDS if scheme.static else None,
        "quantizers": _quantizers(source, spec),
        "clips": source.clips,
        "rotations": _rotations(source),
        "session": PROFILES,
    }


def eos_of(source: Source) -> list[int]:
    """Tokens that end a text."""
    eos: int | list[int] | None = source.config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _value(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None and value.shape is not None  # noqa: PT018 - both are set together
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape}


def _cache(part: CachePart, source: Source) -> dict[str, Any]:
    held = {"key": _held_keys(source), "value": "values"}
    # Of one head of keys, or of values, or one of each.
    bytes_ = len(part.states) * sum(array.width * array.dtype.itemsize for array in part.arrays)
    return {
        "holds": ", then as many heads of ".join(held[name] for name in part.states),
        "layout": _layout(part),
        "bytes_per_token_and_head": bytes_,
        "arrays": [{"past": array.past("{layer}"), "present": array.present("{layer}")} for array in part.arrays],
    }


def _held_keys(source: Source) -> str:
    rotated = " and R3" if source.rotations.query_key is not None else ""
    mapped = " and key_transform" if source.maps is not None and source.scheme.cache is not None else ""
    centred = ", less key_centre" if source.scheme.centre_keys else ""
    return f"keys after the rotary embedding{rotated}{mapped}{centred}"


def _layout(part: CachePart) -> str:
    if part.quantizer is None or not part.packed:
        return "values"
    layout = "one code to a byte"
    if part.quantizer.bits == 4:
        layout = "two codes to a byte: low nibble channels [0, head_dim/2), high nibble the rest"
    return f"{layout}; stored is code + {-part.quantizer.code_range[0]}" if part.quantizer.symmetric else layout


def _quantizers(source: Source, spec: Settings) -> dict[str, Any]:
    """Of each part of the model."""
    scheme = source.scheme
    cache = cache_integers_of(scheme.cache)
    assert cache is not None
    parts = {
        "weights": weight_integers_of(scheme.weights),
        "activations": spec.activations(scheme),
        "attention_output": spec.output_activations(scheme, source.head_dim),
        **cache._asdict(),
        "head": ROUNDED if spec.head == "int8" else None,
    }
    stored = {"weights", "head", *(("activations", "attention_output") if scheme.static else ())}
    return {name: _quantizer(quantizer, name not in stored) for name, quantizer in parts.items()}


def _quantizer(quantizer: Quantizer | None, dynamic: bool) -> dict[str, Any] | None:
    """A quantizer and its formula; where it is not dynamic, scale and zero point are stored."""
    if quantizer is None:
        return None
    grid = _grid(quantizer) if dynamic else []
    zero_point = "" if quantizer.symmetric else " + zero_point"
    smallest, largest = quantizer.code_range
    code = f"code = clip(round_half_even(x / scale){zero_point}, {smallest}, {largest})"
    value = "value = code * scale" if quantizer.symmetric else "value = (code - zero_point) * scale"
    return {
        "bits": quantizer.bits,
        "symmetric": quantizer.symmetric,
        "clip": asdict(quantizer.clip),
        "group_size": quantizer.group_size,
        "formula": [*grid, code, value],
    }


def _grid(quantizer: Quantizer) -> list[str]:
    """How scale and zero point come from the values x of one group."""
    amount, largest = quantizer.clip.amount, quantizer.code_range[1]

    def end(extreme: str, x: str) -> str:
        if quantizer.clip.kind == "ratio":
            return f"{amount} * {extreme}({x})"
        level = amount if extreme == "max" else 1 - amount
        return f"quantile({x}, {level:g})"

    if quantizer.symmetric:
        return [f"scale = {end('max', '|x|')} / {largest}", "scale = 1 where scale == 0"]
    return [
        f"low = min({end('min', 'x')}, 0)",
        f"high = max({end('max', 'x')}, 0)",
        f"scale = (high - low) / {largest}",
        "scale = 1 where scale == 0",
        "zero_point = round_half_even(-low / scale)",
    ]


def _rotations(source: Source) -> dict[str, Any]:
    described: dict[str, Any] = {"origin": source.rotations.origin}
    for name, (number, where) in ROTATIONS.items():
        rotation = getattr(source.rotations, name)
        if rotation is not None:
            described[name] = {"paper": number, "where": where}
            if hasattr(rotation, "construction"):
                described[name] |= {"size": rotation.size, "construction": rotation.construction}
    return described
