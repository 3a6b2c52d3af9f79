"""Sizes of a model, from its configuration alone."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from kurtail_pl.methods.cost import FLOAT32, Sizes
from kurtail_pl.surgery.families import architecture_of, is_dense, mlp_widths
from kurtail_pl.surgery.rotations import head_dim_of


def sizes_of(config: PretrainedConfig, value: int = FLOAT32) -> Sizes:
    """Sizes from a configuration, and the bytes of a computed value; raises UnsupportedArchitecture."""
    architecture = architecture_of(config)
    hidden, head_dim, widths = config.hidden_size, head_dim_of(config), mlp_widths(config)
    attention, cache = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    experts = (getattr(config, "num_local_experts", None) or config.num_experts) if architecture.experts else 1
    chosen = config.num_experts_per_tok if architecture.experts else 1
    beside = int(architecture.shared is not None)
    heads, linears = 2 * hidden * (attention + cache), 2 if architecture.gate is None else 3
    # Channels of each layer's MLPs, all of them and those that a token meets, and how many MLPs there are.
    kinds = (
        ((experts + beside) * widths[0], (chosen + beside) * widths[0], experts + beside),
        (widths[-1], widths[-1], 1),
    )
    channels = [kinds[is_dense(config, layer)] for layer in range(config.num_hidden_layers)]
    # What queries, keys and values read and write, and the output projection; gates, if any, ups and downs.
    ends = [2 * (hidden + attention + cache) + linears * size + 2 * hidden * count for size, _, count in channels]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        widest=max(*widths, attention, hidden),
        wide=max(*widths, attention, hidden) * hidden,
        stack=sum(heads + linears * hidden * size for size, _, _ in channels),
        layer=heads + linears * hidden * max(size for size, _, _ in channels),
        active=heads + linears * hidden * sum(met for _, met, _ in channels) // len(channels),
        attention=attention,
        embedding=config.vocab_size * hidden,
        ends=sum(ends),
        stored=dtype.itemsize,
        value=value,
    )
