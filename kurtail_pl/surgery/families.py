"""The known model families, one record for each `model_type`, and those that cannot be rotated."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from kurtail_pl.errors import UnsupportedArchitecture, shortened
from kurtail_pl.surgery.architecture import Architecture

LLAMA = Architecture(
    model_type="llama",
    embedding="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    head="lm_head",
    attention="self_attn",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
QWEN3 = replace(LLAMA, model_type="qwen3", head_norms=HEAD_NORMS)
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    gate="gate_up_proj",
    up="gate_up_proj",
)
MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    router="mlp.gate",
    experts="mlp.experts",
    on_disk=(
        ("mlp.", "block_sparse_moe."),
        (".gate_proj.", ".w1."),
        (".up_proj.", ".w3."),
        (".down_proj.", ".w2."),
    ),
)
APERTUS = replace(
    LLAMA,
    model_type="apertus",
    attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
    head_norms=HEAD_NORMS,
    gate=None,
    rigid_hidden="xIELU, which is not linear, stands between them",
    kept=("mlp.act_fn",),
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
)
GRANITE_4 = replace(
    GRANITE,
    model_type="granitemoehybrid",
    mlp="shared_mlp",
    gate="input_linear",
    up="input_linear",
    down="output_linear",
    mlp_width="shared_intermediate_size",
    requires=(
        ("layer_types", ("full_attention",), "state-space layers"),
        ("num_local_experts", (0,), "experts beside an MLP that all tokens share"),
        ("position_embedding_type", ("rope",), "no rotary positions"),
    ),
)
HUNYUAN = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    norms_after_rope=True,
)
QWEN3_MOE = replace(
    QWEN3, model_type="qwen3_moe", mlp_width="moe_intermediate_size", router="mlp.gate", experts="mlp.experts"
)

GLM_4_MOE = replace(
    QWEN3_MOE,
    model_type="glm4_moe",
    head_norms_key="use_qk_norm",
    shared="mlp.shared_experts",
    routing="sigmoid",
    choosing_bias="mlp.gate.e_score_correction_bias",
    requires=(("n_shared_experts", (1,), "an MLP beside the experts that is wider than one of them"),),
)
MINIMAX_M2 = replace(
    MIXTRAL,
    model_type="minimax_m2",
    head_norms=HEAD_NORMS,
    whole_norms=True,
    routing="sigmoid",
    choosing_bias="mlp.e_score_correction_bias",
)
OLMOE = replace(
    QWEN3_MOE,
    model_type="olmoe",
    whole_norms=True,
    mlp_width="intermediate_size",
    requires=(("clip_qkv", (None,), "values cut off at a number, which a rotated value (R2) meets elsewhere"),),
)
GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    learned_sinks=True,
    rigid_hidden="both are clamped, and one is added to what up_proj writes",
    kept=("self_attn",),
    router="mlp.router",
    experts="mlp.experts",
    interleaved=True,
)

_POST_NORM = "a norm multiplies the channels of what a block writes before they are added to the residual stream"
GEMMA_3 = replace(
    LLAMA,
    model_type="gemma3_text",
    mlp_norm="pre_feedforward_layernorm",
    head_norms=HEAD_NORMS,
    norm_offset=1.0,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    rigid_residual=_POST_NORM,
    scaled_embedding=True,
    rotary_by_kind=True,
    logits_cap="final_logit_softcapping",
    requires=(("use_bidirectional_attention", (False, None), "attention to tokens that follow"),),
)
GLM_4 = replace(
    LLAMA,
    model_type="glm4",
    gate="gate_up_proj",
    up="gate_up_proj",
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
    rigid_residual=_POST_NORM,
)

REGISTRY: dict[str, Architecture] = {
    record.model_type: record
    for record in (
        LLAMA,
        replace(LLAMA, model_type="mistral"),
        replace(LLAMA, model_type="qwen2"),
        replace(LLAMA, model_type="smollm3"),
        replace(LLAMA, model_type="seed_oss"),
        replace(LLAMA, model_type="ministral"),
        replace(LLAMA, model_type="ministral3", query_scale="llama_4_scaling_beta"),
        APERTUS,
        GRANITE,
        GRANITE_4,
        HUNYUAN,
        QWEN3,
        PHI3,
        MIXTRAL,
        QWEN3_MOE,
        GLM_4_MOE,
        GPT_OSS,
        MINIMAX_M2,
        OLMOE,
        GEMMA_3,
        GLM_4,
    )
}
"""The known families. A user's own record is added by assignment."""

_LAYER_NORM = "its LayerNorm subtracts the mean of a token, which a rotation does not keep"
_NO_PRE_NORM = "its blocks read the residual stream without a norm, and norms multiply what they write"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("bloom", "cohere", "cohere2", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "olmo"), _LAYER_NORM),
    **dict.fromkeys(("opt", "phi", "stablelm", "starcoder2"), _LAYER_NORM),
    **dict.fromkeys(("exaone4", "olmo2", "olmo3"), _NO_PRE_NORM),
    "gemma2": "its scores of the attention are capped, which the attention here does not compute",
    "gemma3": "its record is that of text alone; give the language model in it, gemma3_text",
    "gemma": "its norms multiply by 1 + weight, and its embeddings by a number that its configuration does not hold",
}
"""Families that cannot be rotated exactly as they are, and why."""


def number_of(config: PretrainedConfig, key: str | None) -> float:
    """A number that a record gives the key of; 1 where it gives none."""
    return 1.0 if key is None else float(getattr(config, key))


def is_dense(config: PretrainedConfig, layer: int) -> bool:
    """Whether a decoder layer, by its number, has one gated MLP, in a mixture too."""
    if architecture_of(config).experts is None:
        return True
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    if layer < getattr(config, "first_k_dense_replace", 0):
        return True
    return layer in dense or getattr(config, "num_experts", 1) == 0 or (layer + 1) % step != 0


def mlp_widths(config: PretrainedConfig) -> tuple[int, ...]:
    """Widths that down projections read: of the model's gated MLPs or experts, and of a mixture's dense layers."""
    record = architecture_of(config)
    widths: list[int] = [getattr(config, record.mlp_width)]
    if record.experts is not None and any(is_dense(config, layer) for layer in range(config.num_hidden_layers)):
        widths.append(config.intermediate_size)
    return tuple(dict.fromkeys(widths))


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Record of a model's family.

    Raises:
        UnsupportedArchitecture: naming the type, the types known and, where it is known, why this one cannot be
            rotated; nothing falls back to Llama's names.
    """
    record = REGISTRY.get(config.model_type)
    if record is None:
        known = ", ".join(sorted(REGISTRY))
        if config.model_type in REFUSED:
            raise UnsupportedArchitecture(
                f"model type {config.model_type!r} cannot be rotated exactly: {REFUSED[config.model_type]}; "
                f"use one of {known}"
            )
        raise UnsupportedArchitecture(
            f"model type {config.model_type!r} has no architecture record (known: {known}); "
            "use one of those, or add a record as docs/extend.md describes"
        )
    _require_described(record, config)
    step = getattr(config, "decoder_sparse_step", 1)
    if record.experts is not None and (not isinstance(step, int) or step < 1):
        raise UnsupportedArchitecture(f"decoder_sparse_step is {step!r}; expected 1 or more; mend config.json")
    if record.head_norms_key is not None and not getattr(config, record.head_norms_key):
        return replace(record, head_norms=())
    return record


def _require_described(record: Architecture, config: PretrainedConfig) -> None:
    """Raise UnsupportedArchitecture for a model of a family whose record describes others of it alone."""
    for key, allowed, otherwise in record.requires:
        value = getattr(config, key)
        if not set(value if isinstance(value, list | tuple) else [value]) <= set(allowed):
            raise UnsupportedArchitecture(
                f"{key} is {shortened(repr(value), 60)}: this {record.model_type} has {otherwise}, which no record "
                f"describes; use a model whose {key} is {' or '.join(map(repr, allowed))}"
            )
