"""Keys and values of a prefix: tokens before every text that take its surplus attention, and are never quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.positions import positions_of


def require_tokens(config: PretrainedConfig, prefix: list[int]) -> None:
    """Raise ConfigError when a prefix is empty, too long, of a token that the model does not know, or has no place."""
    if not prefix:
        raise ConfigError("prefix is empty; give tokens, or null for none")
    for token in prefix:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(f"prefix holds token {token}; this model has tokens 0 to {config.vocab_size - 1}")
    if len(prefix) > positions_of(config):
        raise ConfigError(f"prefix has {len(prefix)} tokens and this model has {positions_of(config)} positions")
    if architecture_of(config).norms_after_rope:
        raise ConfigError(
            f"prefix is {shortened(str(prefix), 60)} and a {config.model_type} has norms of heads behind RoPE, whose "
            "scores tell more of positions than their difference: none comes before the first; write prefix: null"
        )


@torch.no_grad()
def prefix_states(
    checkpoint: Checkpoint, prefix: list[int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rotated keys and values of a prefix in each layer of a fused model, ``[kv_heads, tokens, head_dim]`` both.

    The last token is at position -1, so that texts begin at 0 as without a prefix: rotary embeddings know differences
    alone. (Those of longrope have the angles of short texts.) The model that computes them is the float one
    (PrefixQuant, arXiv 2410.05265).

    Args:
        checkpoint: a fused model.
        prefix: tokens.
        dtype: floating-point type of the computation.
        device: where it is done.
    """
    walker = Walker(checkpoint, skeleton(checkpoint), dtype, device)
    embedding = walker.embedding()
    states = walker.embed(embedding, torch.tensor([prefix], device=walker.device))
    embedding.to("meta")
    ids = torch.arange(-len(prefix), 0, device=walker.device).unsqueeze(0)
    # Queries that grow with their position are before the first as large as at it.
    grown = ids.clamp(min=0)
    for index, layer in walker.layers("prefix"):
        cache, positions = DynamicCache(), walker.angles(layer, states, ids)
        states = layer(
            states, past_key_values=cache, position_ids=grown, position_embeddings=positions, attention_mask=None
        )
        cached = cache.layers[index]
        assert isinstance(cached, DynamicLayer)
        assert cached.keys is not None and cached.values is not None  # noqa: PT018 - both are set together
        rotation = layer.get_submodule(walker.architecture.attention).query_key_rotation
        keys = cached.keys if rotation is None else rotation(cached.keys)  # type: ignore[operator]
        yield keys[0], cached.values[0]
