"""A model's configuration from the metadata of a GGUF file; what nobody reads and could change the model is refused."""

from __future__ import annotations

import copy
from math import inf
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kurtail_pl.errors import CheckpointError, UnsupportedArchitecture, first_of, reason, shortened
from kurtail_pl.storage.gguf_header import GgufHeader

FAMILIES = {
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
"""Architectures that are converted: llama.cpp's name -> transformers' `model_type`."""
HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "pooling_type")
"""Keys of an architecture that llama.cpp's own inference of a text does not read."""
FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {"llama": (FREQUENCIES, SHORT, LONG), "phi3": (SHORT, LONG)}
"""Tensors that are no weights, and the architectures that llama.cpp reads them for."""
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's scaling; a file states its result alone, not the factor nor the length it started from."""
ORIGINAL = "original_max_position_embeddings"
GEMMA = {"pattern": 6, "local_theta": 10000.0, "layers_of_27b": 62}
"""What llama.cpp's own source says of all Gemma 3: every sixth layer attends to all of a text, the others' rotary base,
and the one whose queries are scaled by another width than their heads' (`src/models/gemma3.cpp`)."""
BETAS = {"fast": 32.0, "slow": 1.0}
BIASES = {
    "llama": {"attention_bias": "attn_", "mlp_bias": "ffn_"},
    "qwen3": {"attention_bias": "attn_"},
    "qwen3moe": {"attention_bias": "attn_"},
}
"""Settings for biases, and what the tensors' names hold that have them."""
EMBEDDING = "token_embd.weight"
ELSEWHERE = "give the original model's folder"


class _Keys:
    """The keys of an architecture; knows which of them were read."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.path, self.prefix = header.path, f"{architecture}."
        self.left = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is not negative; raises CheckpointError when there is none and no default."""
        value = self.left.pop(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} does not say {self.prefix}{key}; {ELSEWHERE}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            shown = str(value)[:30]
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is {shown}, expected one number; {ELSEWHERE}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of one or more."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is {value}, expected a number above 0; {ELSEWHERE}")
        return int(value)

    def require(self, key: str, *wanted: float) -> None:
        """Raise CheckpointError when a key is there and has none of the values that our modules compute by."""
        value = self.left.pop(key, wanted[0])
        if value not in wanted:
            self.refuse(key, value, wanted[0])

    def refuse(self, key: str, value: object, wanted: object) -> NoReturn:
        """Raise CheckpointError for a value that cannot be carried over."""
        raise CheckpointError(f"{self.path}: {self.prefix}{key} is {str(value)[:30]}, expected {wanted}; {ELSEWHERE}")

    def require_all_read(self) -> None:
        """Raise CheckpointError when a key is left that may change the model; a switch that is off does not."""
        self.require("attention.causal", True)
        unread = [key for key, value in self.left.items() if value and key not in HARMLESS]
        if unread:
            said = first_of([shortened(self.prefix + key, 60) for key in unread])
            raise CheckpointError(f"{self.path} says {said}, which the conversion does not carry; {ELSEWHERE}")


def config_of(header: GgufHeader) -> PretrainedConfig:
    """Configuration of the model in a GGUF file.

    Raises:
        CheckpointError: when the file holds no model, a value is missing or impossible, or one cannot be carried over.
        UnsupportedArchitecture: when the architecture is not converted.
    """
    architecture, tensors = _architecture(header), header.tensors
    keys = _Keys(header, architecture)
    settings = _sizes(keys, header, architecture)
    settings |= _tokens(header, settings["vocab_size"])
    if isinstance(name := header.metadata.get("general.name"), str):
        settings["_model_name_or_path"] = name
    for setting, part in BIASES.get(architecture, {}).items():
        if any(f".{part}" in name and name.endswith(".bias") for name in tensors):
            settings[setting] = True
    keys.require_all_read()
    try:
        config: PretrainedConfig = AutoConfig.for_model(FAMILIES[architecture], **settings)
        if FREQUENCIES in tensors and FREQUENCIES in ROPE_TENSORS.get(architecture, ()):
            config.rope_parameters = _llama3(header, config)
    except CheckpointError:
        raise
    except Exception as error:  # Each configuration has checks of its own, with exceptions of its own.
        raise CheckpointError(f"{header.path} describes no {architecture}: {reason(error)}; {ELSEWHERE}") from error
    return config


def _architecture(header: GgufHeader) -> str:
    """The architecture of the model in a file, by llama.cpp's name."""
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"{header.path} holds {str(kind)[:30]!r} (general.type), no model; give the model's file")
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedArchitecture(
            f"{header.path} has the architecture {str(architecture)[:30]!r}; expected one of {', '.join(FAMILIES)}; "
            "give a model of these, or the original model's folder"
        )
    return architecture


def _sizes(keys: _Keys, header: GgufHeader, architecture: str) -> dict[str, Any]:
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    keys.require("attention.value_length", head_dim)
    rotary, positions = keys.count("rope.dimension_count", head_dim), keys.count("context_length")
    keys.left.pop("vocab_size", None)  # The embedding's rows say it.
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"{header.path} has no tensor {EMBEDDING}; give the file of a whole model")
    rope = _rope(keys, header, positions, rotary)
    layers = keys.count("block_count")
    if layers > len(header.tensors):
        keys.refuse("block_count", layers, f"a number that {len(header.tensors)} tensors are enough for")
    settings: dict[str, Any] = {
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "max_position_embeddings": positions,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": rope,
    }
    if architecture == "phi3":
        rope["partial_rotary_factor"] = rotary / head_dim
        settings["sliding_window"] = int(keys.number("attention.sliding_window", 0)) or None
        settings[ORIGINAL] = rope.get(ORIGINAL, positions)
    elif rotary != head_dim:
        keys.refuse("rope.dimension_count", rotary, head_dim)
    if architecture in ("phi3", "qwen2"):
        if head_dim != hidden // heads:
            keys.refuse("attention.key_length", head_dim, hidden // heads)
    else:
        settings["head_dim"] = head_dim
    if architecture == "gemma3":
        settings |= _gemma3(keys, settings)
    if architecture != "qwen3moe":
        return settings | {"intermediate_size": keys.count("feed_forward_length")}
    chosen = keys.count("expert_used_count")
    keys.require("expert_weights_norm", True)
    keys.require("expert_weights_scale", 1.0, 0.0)
    keys.require("expert_gating_func", 1, 0)
    width = keys.count("expert_feed_forward_length")
    return settings | {
        "intermediate_size": keys.count("feed_forward_length", width),
        "moe_intermediate_size": width,
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": chosen,
        "norm_topk_prob": True,  # llama.cpp always does, and Qwen's models do.
    }


def _gemma3(keys: _Keys, settings: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 has of its own: windows of most layers, with angles of their own, and the scale of queries."""
    of_27b = settings["num_hidden_layers"] == GEMMA["layers_of_27b"]
    widths = settings["hidden_size"] // settings["num_attention_heads"], settings["head_dim"]
    keys.require("final_logit_softcapping", 0.0)
    return {
        "sliding_window": keys.count("attention.sliding_window"),
        "sliding_window_pattern": GEMMA["pattern"],
        "query_pre_attn_scalar": widths[0] if of_27b else widths[1],
        "rope_parameters": {
            "full_attention": settings["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": GEMMA["local_theta"]},
        },
    }


def _tokens(header: GgufHeader, vocabulary: int) -> dict[str, int | None]:
    """Numbers of the special tokens, None where the file has none: the classes' own defaults are other models'."""
    found: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and (not isinstance(token, int) or not 0 <= token < vocabulary):
            raise CheckpointError(
                f"{header.path}: tokenizer.ggml.{key}_token_id is {str(token)[:30]}, expected one below {vocabulary}; "
                f"{ELSEWHERE}"
            )
        found[f"{name}_token_id"] = token
    return found


def _rope(keys: _Keys, header: GgufHeader, positions: int, rotary: int) -> dict[str, Any]:
    """Rotary embeddings, by llama.cpp's rules for what a file leaves out."""
    theta = float(keys.number("rope.freq_base", 10000.0))
    kind, factor = keys.left.pop("rope.scaling.type", "linear"), keys.number("rope.scale_linear", 0)
    factor = float(keys.number("rope.scaling.factor", factor) or 1)
    original = keys.count("rope.scaling.original_context_length", positions)
    if theta <= 1:
        keys.refuse("rope.freq_base", theta, "more than 1")
    if SHORT in header.tensors or LONG in header.tensors:
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": _factors(header, SHORT, rotary),
            "long_factor": _factors(header, LONG, rotary),
            ORIGINAL: original,
            "attention_factor": float(keys.number("rope.scaling.attn_factor", 1.0)),
        }
    keys.require("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        keys.refuse("rope.scaling.type", kind, "none, linear or yarn")
    if factor < 1:
        keys.refuse("rope.scaling.factor", factor, "1 or more")
    if kind == "yarn":
        keys.require("rope.scaling.yarn_ext_factor", 1.0, -1.0)
        keys.require("rope.scaling.yarn_attn_factor", 1.0)
        fast, slow = (float(keys.number(f"rope.scaling.yarn_beta_{end}", value)) for end, value in BETAS.items())
        if factor > 1:
            yarn = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, ORIGINAL: original}
            return yarn | {"beta_fast": fast, "beta_slow": slow}
    if kind == "linear" and factor > 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _factors(header: GgufHeader, name: str, rotary: int) -> list[float]:
    """What the rotary frequencies of a head are divided by."""
    found = header.values(name).tolist() if name in header.tensors else []
    if len(found) != rotary // 2 or not all(isinstance(value, float) and 0 < value < inf for value in found):
        raise CheckpointError(f"{header.path} has no {rotary // 2} positive numbers in {name}; {ELSEWHERE}")
    return found


def _llama3(header: GgufHeader, config: PretrainedConfig) -> dict[str, Any]:
    """Rotary embeddings by Llama 3.1's formula, whose result a file holds in a tensor."""
    rope = dict(config.rope_parameters)
    factors = torch.tensor(_factors(header, FREQUENCIES, config.head_dim))
    if rope["rope_type"] == "default":
        plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        if bool((factors == 1).all()):
            return rope
        for original in (8192, *(2**power for power in range(4, 21))):
            trial = copy.deepcopy(config)
            trial.rope_parameters = rope | LLAMA3 | {"factor": factors.max().item(), ORIGINAL: original}
            found, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
            if torch.allclose(found, plain / factors, rtol=1e-5, atol=0):
                return dict(trial.rope_parameters)
    raise CheckpointError(
        f"{header.path} scales its rotary frequencies by {FREQUENCIES}, and not by Llama 3.1's formula; {ELSEWHERE}"
    )
