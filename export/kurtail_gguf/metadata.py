"""What a GGUF file says of its model, beside the tokenizer."""

from __future__ import annotations

from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

from kurtail_gguf.families import Family
from kurtail_gguf.rope import Rope
from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.inspection.facts import ONLINE_KEY
from kurtail_pl.storage.card import read_card


def metadata(source: Source, family: Family, rope: Rope, file_type: LlamaFileType) -> dict[str, Any]:
    """Keys and values; their types are those of the file: bool, uint32, float32, string, array."""
    config = source.config
    sizes: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": len(source.layers),
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": source.heads,
        "attention.head_count_kv": source.kv_heads,
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if source.architecture.experts is not None:
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        width = getattr(config, source.architecture.mlp_width)
        sizes |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        sizes |= {"expert_feed_forward_length": width} if width != config.intermediate_size else {}
    sizes |= {f"rope.{key}": value for key, value in rope.keys.items()}
    general = {
        "general.type": "model",
        "general.name": str(read_card(source.folder)["source"]["model"]),
        "general.file_type": int(file_type),
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    turned = [name for name in source.rotations.online if name != "query_key"]
    if turned:
        general[ONLINE_KEY] = ",".join(turned)  # llama.cpp does not read it: `kurtail inspect` does.
    return general | {f"{family.name}.{key}": value for key, value in sizes.items()}


def put(writer: GGUFWriter, keys: dict[str, Any]) -> None:
    """Add keys to a file by the types of their values."""
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
