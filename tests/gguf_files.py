"""GGUF files of tiny models, in llama.cpp's layout, written by the `gguf` package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = ["<unk>", "<s>", *[chr(ord("a") + i) for i in range(26)], "ab", "cd"]
"""Padded to the model's size by tokens that no text has."""

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Where its names say something else, or nothing."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Sequence[float]] | None = None,
    without: Sequence[str] = (),
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a model.

    Args:
        path: where to.
        model: a llama, mistral, phi3, qwen2, qwen3, qwen3_moe or gemma3_text.
        metadata: more keys, ``{arch}`` standing for the architecture; None takes one away.
        tensors: more tensors.
        without: names of tensors that are left out.
        kind: type of the matrices.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (sizes(config) | dict(metadata or {})).items():
        _add(writer, key.replace("{arch}", arch), value)
    state = contents(model, arch) | {name: np.asarray(values, np.float32) for name, values in (tensors or {}).items()}
    for name, values in state.items():
        if name in without:
            continue
        if values.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter says of a model, and a tokenizer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found = {
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.block_count": config.num_hidden_layers,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_attention_heads,
        "{arch}.attention.head_count_kv": config.num_key_value_heads,
        "{arch}.attention.key_length": head_dim,
        "{arch}.attention.value_length": head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "{arch}.rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "{arch}.rope.freq_base": float(rope["rope_theta"]),
        "{arch}.vocab_size": config.vocab_size,
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": VOCAB + [f"<extra{i}>" for i in range(config.vocab_size - len(VOCAB))],
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    if config.model_type == "gemma3_text":
        found["{arch}.attention.sliding_window"] = config.sliding_window
    if config.model_type == "qwen3_moe":
        found |= {
            "{arch}.expert_count": config.num_experts,
            "{arch}.expert_used_count": config.num_experts_per_tok,
            "{arch}.expert_feed_forward_length": config.moe_intermediate_size,
        }
    return found


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def contents(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Tensors by llama.cpp's names."""
    config, found, inside = model.config, {}, LAYER | (GEMMA if arch == "gemma3" else {})
    for name, stored in model.state_dict().items():
        # Files of Gemma hold what norms multiply by.
        tensor = stored + 1 if arch == "gemma3" and "norm" in name else stored
        module, _, end = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if module in OUTSIDE:
            found[f"{OUTSIDE[module]}.{end}"] = tensor.numpy()
            continue
        _, _, layer, inner = module.split(".", 3)
        if inner == "mlp.experts":
            parts = (
                zip(("gate", "up"), tensor.chunk(2, 1), strict=True) if end == "gate_up_proj" else [("down", tensor)]
            )
            found |= {f"blk.{layer}.ffn_{part}_exps.weight": values.contiguous().numpy() for part, values in parts}
            continue
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        values = interleaved(tensor, heads[inner]) if arch == "llama" and inner in heads else tensor
        found[f"blk.{layer}.{inside[inner]}.{end}"] = values.numpy()
    return found


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a llama's q or k as GGUF has them: RoPE's pairs beside each other, not half a head apart."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
