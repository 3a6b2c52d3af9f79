"""What llama.cpp computes for a family: names of its tensors, the order of their rows, and what it has no place for.

Read in llama.cpp's `src/models` and `src/llama-model.cpp` of October 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError

QUERIES, KEYS, VALUES, FUSED, OUTPUT = "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"
READERS = frozenset((QUERIES, KEYS, VALUES, FUSED))


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Args:
        name: its value of ``general.architecture``.
        biases: parts of a layer that may have one.
        neighbours: whether RoPE turns neighbouring rows of queries and keys, not those half a head apart.
        frequencies: whether it reads a tensor that divides the rotary frequencies.
        weight_scales: whether all its linears multiply by the scale that NVFP4 has for a whole weight.
        whole_heads: whether all heads together must be as wide as the residual stream.
    """

    name: str
    biases: frozenset[str] = READERS
    neighbours: bool = False
    frequencies: bool = False
    weight_scales: bool = False
    whole_heads: bool = False


_LLAMA = Family(
    "llama",
    READERS | {OUTPUT, "ffn_gate", "ffn_up", "ffn_down"},
    neighbours=True,
    frequencies=True,
    weight_scales=True,
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": Family("smollm3", neighbours=True),
    "qwen2": Family("qwen2", whole_heads=True),
    "qwen3": Family("qwen3", weight_scales=True),
    "qwen3_moe": Family("qwen3moe", weight_scales=True),
    "phi3": Family("phi3", whole_heads=True),
}
"""By the `model_type` of transformers."""
UNROTATED = 4
"""Every so many layers llama.cpp's smollm3 has one without RoPE, the last of them."""


class Part(NamedTuple):
    """A tensor of a decoder layer in the file, and the modules that it holds: one, or all experts, stacked."""

    name: str
    modules: tuple[str, ...]
    stacked: bool = False


def family_of(source: Source) -> Family:
    """The architecture of an artefact's model.

    Raises:
        ConfigError: when llama.cpp does not have it, or computes something else for this configuration.
    """
    config, kind = source.config, source.config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise ConfigError(
            f"the model is a {kind}, and GGUF files are written for {', '.join(FAMILIES)}; use another exporter"
        )
    here = f"llama.cpp's {family.name}"
    if (activation := getattr(config, "hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act is {activation!r} and {here} has silu; use another exporter")
    if family.whole_heads and source.heads * source.head_dim != config.hidden_size:
        raise ConfigError(
            f"the model has {source.heads} heads of {source.head_dim} and a hidden_size of {config.hidden_size}, and "
            f"in {here} the first is as wide as the second; use another exporter"
        )
    window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < positions:
        raise ConfigError(
            f"sliding_window is {window} and {here} attends to all of a text; for texts up to {window} tokens write "
            f"sliding_window: null and max_position_embeddings: {window} in the model's config.json before fusion"
        )
    _require_layers(source, here)
    return family


def _require_layers(source: Source, here: str) -> None:
    """Raise ConfigError for layers that llama.cpp has otherwise."""
    config, experts = source.config, source.architecture.experts
    if experts is not None and not getattr(config, "norm_topk_prob", True):
        raise ConfigError(
            f"norm_topk_prob is false and in {here} the weights of experts sum to one; use another exporter"
        )
    for index, layer in enumerate(source.layers):
        if experts is not None and not source.architecture.has_experts(layer):
            raise ConfigError(f"layer {index} is dense and {here} has experts in all of them; use another exporter")
    rotated = getattr(config, "no_rope_layers", None)
    if rotated is not None:
        wanted = [int((index + 1) % UNROTATED != 0) for index in range(len(source.layers))]
        if [int(value) for value in rotated] != wanted:
            raise ConfigError(
                f"no_rope_layers is {list(rotated)} and {here} leaves RoPE out of every fourth layer; use another "
                "exporter"
            )


def linears_of(source: Source, index: int) -> list[Part]:
    """Linears of a decoder layer, by their names in the file without an ending."""
    record, layer, prefix = source.architecture, source.layers[index], source.layer_name(index)

    def part(name: str, *modules: str) -> Part:
        return Part(f"blk.{index}.{name}", tuple(f"{prefix}.{module}" for module in modules), len(modules) > 1)

    if len(record.attention_readers) == 1:
        attention = [part(FUSED, record.query)]
    else:
        attention = [part(QUERIES, record.query), part(KEYS, record.key), part(VALUES, record.value)]
    attention.append(part(OUTPUT, record.output))
    mlps, ending = record.gated_mlps(layer), "_exps" if record.has_experts(layer) else ""
    names = {"ffn_gate": record.gate, "ffn_up": record.up, "ffn_down": record.down}
    if record.gate == record.up:
        del names["ffn_gate"]
    mlp = [part(f"{name}{ending}", *(f"{each}.{inner}" for each in mlps)) for name, inner in names.items()]
    return attention + mlp


def norms_of(source: Source, index: int) -> list[Part]:
    """Norms of a decoder layer."""
    record, prefix = source.architecture, source.layer_name(index)
    names = {"attn_norm": record.attention_norm, "ffn_norm": record.mlp_norm}
    names |= dict(zip(("attn_q_norm", "attn_k_norm"), record.head_norms, strict=False))
    return [Part(f"blk.{index}.{name}", (f"{prefix}.{module}",)) for name, module in names.items()]
