"""What a model family looks like, as data: one frozen record for each `model_type`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from kurtail_pl.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a decoder-only RMSNorm model are, by module name.

    Names of the second block are relative to a decoder layer. Every norm is named with the linears that read it, since
    folding the norm's weight and rotating the residual stream both act on those.
    """

    model_type: str
    embedding: str
    layers: str
    final_norm: str
    rotary: str
    head: str

    attention: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str

    mlp: str
    mlp_norm: str
    gate: str
    up: str
    down: str

    @property
    def attention_readers(self) -> tuple[str, ...]:
        """Linears of a layer that read the attention norm."""
        return (self.query, self.key, self.value)

    @property
    def mlp_readers(self) -> tuple[str, ...]:
        """Linears of a layer that read the MLP norm."""
        return (self.gate, self.up)

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer, in the order in which data reaches them."""
        return (*self.attention_readers, self.output, *self.mlp_readers, self.down)


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
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

REGISTRY: dict[str, Architecture] = {record.model_type: record for record in (LLAMA,)}
"""The known families. A user's own record is added by assignment."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Record of a model's family.

    Raises:
        UnsupportedArchitecture: naming the type and the types known; nothing falls back to Llama's names.
    """
    record = REGISTRY.get(config.model_type)
    if record is None:
        known = ", ".join(sorted(REGISTRY))
        raise UnsupportedArchitecture(
            f"model type {config.model_type!r} has no architecture record (known: {known}); "
            "use one of those, or add a record as CONTRIBUTING.md describes"
        )
    return record


def check_layer(layer: nn.Module, architecture: Architecture) -> None:
    """Compare a decoder layer with its record, both ways.

    Raises:
        UnsupportedArchitecture: naming the modules that the record expects and the layer lacks, and the linears that
            the layer has and the record does not know.
    """
    names = dict(layer.named_modules())
    expected = {*architecture.linears, architecture.attention_norm, architecture.mlp_norm}
    missing = sorted(expected - set(names))
    unknown = sorted(name for name, m in names.items() if isinstance(m, nn.Linear) and name not in expected)
    if missing or unknown:
        raise UnsupportedArchitecture(
            f"the decoder layer does not match the record of {architecture.model_type!r}: "
            f"missing modules {missing}, unknown linears {unknown}; correct the record"
        )
