"""How much attention each token gets: what an error in its value counts for."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 256
"""Whose scores are held at once."""


def attention_received(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """The squared attention ``a_ij^2`` that each key gets, summed over heads and queries.

    An error e in the value of token j changes what query i reads by ``a_ij e``: with independent errors the energy of
    the change is the sum of their energies, each times this (BoA, arXiv 2406.13474, has the whole ``A^T A``).

    Args:
        query: of one text, ``[1, heads, queries, head_dim]``.
        key: ``[1, kv_heads, keys, head_dim]``; those of the queries' own tokens come last.
        mask: ``[..., queries, keys]``, true where a query sees a key, or 0 where it is added to the scores; None for
            causal attention.
        scaling: of the scores.
        sinks: scores ``[heads]`` of no key, which take their share of the softmax; None for none.

    Returns:
        ``[keys]``, float32 or wider.
    """
    query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
    heads, queries = key.shape[1], query.shape[2]
    received = key.new_zeros(key.shape[2])
    if mask is None:
        shape = queries, key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=key.device).tril(key.shape[2] - queries)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill_(~mask, -torch.inf)
    for some, block in zip(torch.split(query, QUERIES, 2), torch.split(mask, QUERIES, -2), strict=True):
        grouped = some.view(1, heads, -1, *some.shape[2:])
        scores = grouped @ key.unsqueeze(2).mT * scaling + block
        if sinks is not None:
            own = sinks.to(scores).view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, own], -1)
        received += scores.softmax(-1)[..., : key.shape[2]].square().sum((0, 1, 2, 3))
    return received
