"""Sizes of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from kurtail_pl.surgery.families import architecture_of, is_dense, mlp_widths
from kurtail_pl.surgery.rotations import head_dim_of


@dataclass(frozen=True)
class Sizes:
    """Parameters and widths of a model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        widest: width of the widest linear's input, which decides the largest Hessian.
        wide: parameters of that linear.
        stack: parameters of all decoder layers.
        layer: parameters of one decoder layer, the largest.
        active: parameters that one token meets in a layer (fewer, in a mixture), the mean over layers.
        attention: query heads times their width.
        embedding: parameters of the embedding; the head has as many.
        stored: bytes of a parameter on disk.
    """

    layers: int
    hidden: int
    widest: int
    wide: int
    stack: int
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
    hidden, head_dim, widths = config.hidden_size, head_dim_of(config), mlp_widths(config)
    attention, cache = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    experts = (getattr(config, "num_local_experts", None) or config.num_experts) if architecture.experts else 1
    chosen = config.num_experts_per_tok if architecture.experts else 1
    heads = 2 * hidden * (attention + cache)
    # Channels of each layer's MLP, all of them and those that a token meets.
    kinds = ((experts * widths[0], chosen * widths[0]), (widths[-1], widths[-1]))
    channels = [kinds[is_dense(config, layer)] for layer in range(config.num_hidden_layers)]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        widest=max(*widths, attention, hidden),
        wide=max(*widths, attention, hidden) * hidden,
        stack=sum(heads + 3 * hidden * size for size, _ in channels),
        layer=heads + 3 * hidden * max(size for size, _ in channels),
        active=heads + 3 * hidden * sum(met for _, met in channels) // len(channels),
        attention=attention,
        embedding=config.vocab_size * hidden,
        stored=dtype.itemsize,
    )
