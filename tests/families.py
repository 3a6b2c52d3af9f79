"""A tiny model of every family, each odd case switched on; and a Llama's weights re-expressed in other layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

WINDOW = 24
"""Sliding window of the families that have one, shorter than the tests' texts."""


def sizes(**changes: Any) -> dict[str, Any]:
    """Heads wider than hidden / heads, grouped queries, and a width that Paley cannot do."""
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    widths = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 172, "num_hidden_layers": 3}
    return {**widths, **heads, **tokens, "max_position_embeddings": 256, "tie_word_embeddings": False, **changes}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def llama3() -> PretrainedConfig:
    scaling = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    return LlamaConfig(**sizes(attention_bias=True, mlp_bias=True), **scaling)


def mistral() -> PretrainedConfig:
    return MistralConfig(**sizes(sliding_window=WINDOW, num_key_value_heads=1))


def qwen2() -> PretrainedConfig:
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=64)
    return Qwen2Config(
        **sizes(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True), **yarn
    )


def qwen3() -> PretrainedConfig:
    return Qwen3Config(**sizes(attention_bias=True))


def phi3() -> PretrainedConfig:
    """Fused projections, half of each head rotated by position, factors for long texts, heads of 96."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(24)], "long_factor": [2.0 + 0.2 * i for i in range(24)]}
    longrope = rope("longrope", partial_rotary_factor=0.5, original_max_position_embeddings=32, **factors)
    shape = {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 96}
    return Phi3Config(
        **sizes(**shape, sliding_window=WINDOW, original_max_position_embeddings=32, resid_pdrop=0.0), **longrope
    )


def mixtral() -> PretrainedConfig:
    return MixtralConfig(**sizes(intermediate_size=60, num_local_experts=4, sliding_window=WINDOW))


def qwen3_moe() -> PretrainedConfig:
    """A dense layer, wider than the experts, between two mixtures."""
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": False}
    return Qwen3MoeConfig(**sizes(attention_bias=True), **experts, mlp_only_layers=[1])


def seed_oss() -> PretrainedConfig:
    return SeedOssConfig(**sizes(attention_bias=True, attention_out_bias=True, mlp_bias=True))


def ministral() -> PretrainedConfig:
    """Sliding and full layers in turn."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return MinistralConfig(**sizes(sliding_window=WINDOW, layer_types=kinds))


def ministral3() -> PretrainedConfig:
    """Queries grow every eight tokens."""
    yarn = rope("yarn", factor=16.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.4)
    return Ministral3Config(**sizes(), **yarn)


def apertus() -> PretrainedConfig:
    """No gate: xIELU with two learned numbers in each layer."""
    scaling = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    return ApertusConfig(**sizes(attention_bias=True), **scaling)


def granite() -> PretrainedConfig:
    """None of its four numbers is one."""
    numbers = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
        "attention_multiplier": 0.3,
    }
    return GraniteConfig(**sizes(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), **numbers)


def granite4() -> PretrainedConfig:
    """The dense one: what the others call the shared MLP is the only one."""
    dense = {
        "num_local_experts": 0,
        "shared_intermediate_size": 172,
        "layer_types": ["full_attention"] * 3,
        "mamba_n_heads": 8,
    }
    numbers = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
        "attention_multiplier": 0.3,
    }
    return GraniteMoeHybridConfig(
        **sizes(attention_bias=True, intermediate_size=60), **dense, **numbers, position_embedding_type="rope"
    )


def hunyuan() -> PretrainedConfig:
    return HunYuanDenseV1Config(**sizes(attention_bias=True), **rope("dynamic", factor=1.0, alpha=50.0))


def glm4_moe() -> PretrainedConfig:
    """A dense layer before two mixtures, two groups of experts and one beside them, half of each head rotated."""
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1}
    routing = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}
    return Glm4MoeConfig(**sizes(attention_bias=True), **experts, **routing, use_qk_norm=True)


def minimax_m2() -> PretrainedConfig:
    """Norms of all heads at once, a bias that chooses experts beside the router, half of each head rotated."""
    return MiniMaxM2Config(
        **sizes(intermediate_size=60, num_local_experts=4, num_experts_per_tok=2),
        **rope("default", partial_rotary_factor=0.5),
    )


def olmoe() -> PretrainedConfig:
    """Heads as wide as hidden / heads, as its class has them."""
    shape = {"hidden_size": 96, "intermediate_size": 60}
    return OlmoeConfig(**sizes(**shape), num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)


def gpt_oss() -> PretrainedConfig:
    """Learned sinks, biases everywhere, experts that a small clamp meets often, every other layer sliding."""
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0}
    return GptOssConfig(**sizes(intermediate_size=60, sliding_window=WINDOW), **experts, **yarn)


def gemma3() -> PretrainedConfig:
    """Post-norms, norms that add one to their weights, sliding and full layers with angles of their own, capped logits.

    Its own scale of queries is not that of its heads.
    """
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    angles = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
    }
    return Gemma3TextConfig(
        **sizes(attention_bias=True, tie_word_embeddings=True), sliding_window=WINDOW, layer_types=kinds,
        rope_parameters=angles, query_pre_attn_scalar=24, final_logit_softcapping=12.0,
    )  # fmt: skip


def glm4() -> PretrainedConfig:
    """Post-norms, fused gate and up, half of each head rotated by position."""
    return Glm4Config(**sizes(attention_bias=True), **rope("default", partial_rotary_factor=0.5))


def smollm3() -> PretrainedConfig:
    return SmolLM3Config(**sizes(attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 1]))


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    maker.__name__: maker
    for maker in (
        llama3, mistral, qwen2, qwen3, phi3, mixtral, qwen3_moe, smollm3, seed_oss, ministral, ministral3, apertus,
        granite,        granite4, hunyuan, glm4_moe, gpt_oss, minimax_m2, olmoe, gemma3, glm4,
    )
}  # fmt: skip


WITHOUT_GRAPH = {
    "apertus": "an MLP of a apertus has no gate",
    "gemma3": "has norms of what its blocks write",
    "glm4": "has norms of what its blocks write",
    "glm4_moe": "weighs experts by sigmoids",
    "gpt_oss": "has learned sinks",
    "minimax_m2": "norms of all heads at once",
    "olmoe": "norms of all heads at once",
}
"""Families that ONNX has no graph for, and what the export says."""
GRAPHS = [name for name in FAMILIES if name not in WITHOUT_GRAPH]
PLAIN = ("seed_oss", "ministral", "ministral3", "granite", "granite4")
"""Families whose graphs differ from others' by biases, masks and factors, which no quantizer meets."""
QUANTIZED_GRAPHS = [name for name in GRAPHS if name not in PLAIN]


def tiny_family(name: str, **changes: Any) -> PreTrainedModel:
    """A filled model of a family; keyword arguments change the configuration."""
    config = FAMILIES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    return fill(model).eval().requires_grad_(False)


def fill(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that every part matters: norms far from one, biases and the embedding's mean not zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name:
                parameter.copy_(1.5 + 0.8 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 + 0.5 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))
    return model


def re_expressed(llama: Path, layout: str) -> PreTrainedModel:
    """A Llama's weights in the layout of `phi3`, `qwen2` or `mixtral`; the function stays the same.

    A Qwen2 gets biases of zero. A Mixtral gets four times the same expert and a router that has its preferences: the
    weights of the chosen experts sum to one.
    """
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = source.config.to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keep += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    keep += ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    kept = {key: config[key] for key in keep} | {"pad_token_id": None}
    target: PretrainedConfig = {
        "phi3": lambda: Phi3Config(**kept),
        "qwen2": lambda: Qwen2Config(**kept),
        "mixtral": lambda: MixtralConfig(**kept, num_local_experts=4),
    }[layout]()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        target, dtype=torch.float32, experts_implementation="eager"
    )
    rewrite = {"phi3": _fused, "qwen2": _with_biases, "mixtral": _mixture}[layout]
    state = rewrite(source.state_dict(), target)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.eval()


def _fused(state: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        parts = [state.pop(f"{attention}.{name}_proj.weight") for name in "qkv"]
        state[f"{attention}.qkv_proj.weight"] = torch.cat(parts)
        parts = [state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]
        state[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)
    return state


def _with_biases(state: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    weights = [name for name in state if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    return state | {name.replace("weight", "bias"): torch.zeros(len(state[name])) for name in weights}


def _mixture(state: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    for i in range(config.num_hidden_layers):
        mlp = f"model.layers.{i}.mlp"
        gate, up, down = (state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(4, 1, 1)
        state[f"{mlp}.experts.down_proj"] = down.repeat(4, 1, 1)
        state[f"{mlp}.gate.weight"] = torch.randn(4, config.hidden_size, generator=draw)
    return state
