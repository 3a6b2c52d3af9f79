"""Sizes of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import head_dim_of


@dataclass(frozen=True)
class Sizes:
    """Parameters and widths of a model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        widest: width of the widest linear's input, which decides the largest Hessian.
        wide: parameters of that linear.
        layer: parameters of one decoder layer.
        active: of these, the ones that one token meets (fewer, in a mixture).
        attention: query heads times their width.
        embedding: parameters of the embedding; the head has as many.
        stored: bytes of a parameter on disk.
    """

    layers: int
    hidden: int
    widest: int
    wide: int
    layer: int
    active: int
    attention: int
    embedding: int
    stored: int

    def forward(self, tokens: int, seqlen: int) -> float:
        """FLOPs of all decoder layers on so many tokens in windows of a length."""
        return tokens * self.layers * (2.0 * self.active + 2.0 * seqlen * self.attention)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Sizes from a configuration; raises UnsupportedArchitecture for an unknown family."""
    architecture = architecture_of(config)
    hidden, head_dim, width = config.hidden_size, head_dim_of(config), getattr(config, architecture.mlp_width)
    attention, cache = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    mlp = 3 * hidden * width
    experts = (getattr(config, "num_local_experts", None) or config.num_experts) if architecture.experts else 1
    chosen = config.num_experts_per_tok if architecture.experts else 1
    heads = 2 * hidden * (attention + cache)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        widest=max(width, attention, hidden),
        wide=max(width, attention, hidden) * hidden,
        layer=heads + experts * mlp,
        active=heads + chosen * mlp,
        attention=attention,
        embedding=config.vocab_size * hidden,
        stored=dtype.itemsize,
    )
