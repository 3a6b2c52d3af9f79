"""Attention with a learned score of nothing for each query head, which takes its share of the softmax."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

SINKS = "s_aux"
"""What transformers' attention functions call these scores ``[heads]``."""


def added_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What is added to the scores, ``[..., queries, keys]``: 0 where a query sees a key.

    Args:
        mask: true where a query sees a key, or already added; None for all keys of a single query, and for causal
            attention from the first key on.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
    """
    if mask is None:
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=key.device)
        mask = mask if query.shape[2] == 1 else mask.tril()
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)


def attend_beside(
    sinks: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attention ``[batch, queries, heads, head_dim]``: a key and a value of zeros whose scores are the sinks.

    Args:
        sinks: ``[heads]``.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: of the same shape.
        mask: see `added_mask`.
        kwargs: of transformers' attention functions, of which `scaling` counts.
    """
    batch, heads, queries, _ = query.shape
    bias = added_mask(mask, query, key).expand(batch, heads, queries, -1)
    own = sinks.to(query.dtype).view(1, -1, 1, 1).expand(batch, heads, queries, 1)
    key, value = (F.pad(x, (0, 0, 0, 1)).repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.cat([bias, own], -1), scale=cast(float, kwargs["scaling"])
    )
    return mixed.transpose(1, 2).contiguous()
