"""Tiny models whose widths GGUF's blocks divide, as artefacts without online rotations of o_proj and down_proj."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from families import tiny_family
from transformers import PreTrainedTokenizerBase

from kurtail_pl.methods import RTN, Format
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations

WIDTHS: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 192}
PLAIN: dict[str, Any] = {"attention_bias": False, "sliding_window": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 32, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    "qwen3": PLAIN,
    "phi3": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "intermediate_size": 64},
    "qwen3_moe": {**PLAIN, "mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 64},
    "smollm3": {
        **PLAIN,
        "mlp_bias": False,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
    },
}
"""Changes of the tiny families: what llama.cpp has no place for is off, all else of their odd cases is on."""


def without_online(checkpoint: Checkpoint) -> Rotations:
    """Random Hadamards that are fused, and R3."""
    rotations = random_rotations(checkpoint.config, 0)
    return replace(rotations, attention_output=None, mlp_hidden=None, dense_hidden=None)


def model_folder(folder: Path, family: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """A tiny model of a family and a tokenizer."""
    tiny_family(family, **{**WIDTHS, **MODELS[family], **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def artefact_of(model: Path, place: Path, text: TextSpec, weights: Format | None, **scheme: Any) -> Path:
    """A model, rotated and rounded to nearest, by default with nothing but its weights quantized."""
    checkpoint = Checkpoint(model)
    fused = fuse(checkpoint, without_online(checkpoint), "quarot", place / "fused")
    asked: Scheme = replace(FLOAT, weights=weights, **scheme)
    return quantize(fused, QuantizeSpec(asked, RTN(), text=text), place / "artefact")
