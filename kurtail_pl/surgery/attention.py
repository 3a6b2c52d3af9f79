"""Attention with rotated, quantized keys and values, through `transformers`' attention interface.

One function serves every family: it receives queries, keys and values after RoPE, rotates queries and keys (R3),
centres the keys, asks the cache's format what it keeps of keys and values, puts a prefix before them, and calls
the stock attention. The cache itself holds float keys and values, of the text alone: a format gives the same numbers
whenever it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.methods import CacheFormat
from kurtail_pl.methods.format import Tensors
from kurtail_pl.surgery.learned_sinks import SINKS, attend_beside
from kurtail_pl.surgery.online import OnlineHadamard, OnlineInverse, OnlineKronecker

ATTENTION = "kurtail"
"""Name of this attention in a model's configuration (`attn_implementation`)."""
KEY_TURNS, QUERY_TURNS = (("query_key_rotation", name) for name in ("key_transform", "query_transform"))
"""What an attention module turns keys and queries by: R3, and a learned map, of whose transpose the queries' is the
inverse."""


class Scored(NamedTuple):
    """What scores are made of: queries and keys behind R3, neither centred nor quantized, the mask, a factor, sinks."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    sinks: Tensor | None = None


def kurtail_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of ``[batch, heads, tokens, head_dim]`` queries on rotated and quantized keys.

    A module that `equip_attention` has not seen attends as usual.
    """
    see, kept = getattr(module, "see_scored", None), is_kept(key)
    query, key = _turned(module, QUERY_TURNS, query), key if kept else _turned(module, KEY_TURNS, key)
    if see is not None:
        see(Scored(query, key, attention_mask, kwargs["scaling"], kwargs.get(SINKS)))
    if not kept:
        key = _centred(module, key)
        cache: CacheFormat | None = getattr(module, "cache", None)
        if cache is not None and not cache.before_rope:
            first = _first(cache.first_tokens, query, key, attention_mask, kwargs.get("position_ids"))
            found = found_by(module)
            key, value = cache.kept_keys(key, first, found), cache.kept_values(value, first, found)
    if getattr(module, "prefix_key", None) is not None:
        key, attention_mask = behind_prefix(module, query, key, attention_mask)
        value = _behind(module.prefix_value, value)  # type: ignore[arg-type]
    if (sinks := kwargs.get(SINKS)) is not None:
        return attend_beside(sinks, query, key, value, attention_mask, **kwargs), None
    output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def keys_of(module: nn.Module, key: Tensor) -> Tensor:
    """Keys ``[batch, kv_heads, tokens, head_dim]`` as they are kept: behind R3 and a learned map, and centred."""
    return _centred(module, _turned(module, KEY_TURNS, key))


def _turned(module: nn.Module, names: tuple[str, ...], heads: Tensor) -> Tensor:
    """Queries or keys behind the module's online maps of them."""
    for name in names:
        turn = getattr(module, name, None)
        heads = heads if turn is None else turn(heads)
    return heads


def _centred(module: nn.Module, key: Tensor) -> Tensor:
    """The same for all keys, the centre moves all scores of a query alike, and the softmax takes no notice."""
    centre = getattr(module, "key_centre", None)
    return key if centre is None else key - centre


def mark_kept(key: Tensor) -> Tensor:
    """Say of keys that a packed cache gives that they, and the values beside them, are what is to be attended to."""
    key.is_kept = True  # type: ignore[attr-defined]
    return key


def is_kept(key: Tensor) -> bool:
    """Whether a packed cache gave them."""
    return getattr(key, "is_kept", False)


def _first(tokens: int, query: Tensor, key: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Which keys are of the first so many tokens of their text, ``[batch, 1, keys, 1]``; None for no tokens."""
    return key_positions(query, key, mask, position_ids)[:, None, :, None] < tokens if tokens else None


def key_positions(query: Tensor, key: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Position in its text of each key that a query attends to; what it says of the other keys means nothing.

    Keys come out of the cache without positions. They may be padded on either side, the first ones gone from a sliding
    window, the last ones still to be written. So it counts down from the last position over the keys attended to.

    Args:
        query: new ones, ``[batch, heads, queries, head_dim]``.
        key: cached and new ones, ``[batch, kv_heads, keys, head_dim]``.
        mask: ``[batch, 1, queries, keys]``, true where a query attends to a key, or 0 where it is added to the scores;
            None for all keys of a single query, and for causal attention from the first key on.
        position_ids: of the queries, ``[batch or 1, queries]``; None for those of the last keys.

    Returns:
        Positions ``[batch or 1, keys]``.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        seen = torch.arange(keys, device=key.device).unsqueeze(0) < (keys if queries == 1 else queries)
    else:
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(-2)
    after = seen.flip(-1).cumsum(-1).flip(-1) - 1
    last = after[:, :1] if position_ids is None else position_ids.amax(-1, keepdim=True)
    return last - after


def equip_attention(attention: nn.Module, rotation: HadamardFactors | None, cache: CacheFormat | None) -> None:
    """Give an attention module what `kurtail_attention` reads from it."""
    attention.register_module("query_key_rotation", None if rotation is None else OnlineHadamard(rotation))
    attention.cache = cache  # type: ignore[assignment]


def put_found(attention: nn.Module, found: Tensors) -> None:
    """Give an attention module what its cache's format found on a calibration text."""
    for name, tensor in found.items():
        attention.register_buffer(f"cache_{name}", tensor)


def found_by(attention: nn.Module) -> Tensors:
    """What its cache's format found, by name; nothing before that."""
    buffers = attention.named_buffers(recurse=False)
    return {name.removeprefix("cache_"): buffer for name, buffer in buffers if name.startswith("cache_")}


def map_keys(attention: nn.Module, keys: Kronecker) -> None:
    """Let an attention module map keys behind R3, and queries by the transposed inverse, so that scores stay."""
    attention.key_transform = OnlineKronecker(keys)
    attention.query_transform = OnlineInverse(attention.key_transform)


def subtract_from_keys(attention: nn.Module, centre: Tensor) -> None:
    """Let an attention module subtract a constant ``[kv_heads, 1, head_dim]`` from rotated keys before they are kept.

    In a float cache its output stays what it is. Keys of a prefix, which has to be there before, move alike.
    """
    attention.register_buffer("key_centre", centre)
    if getattr(attention, "prefix_key", None) is not None:
        attention.prefix_key = attention.prefix_key - centre  # type: ignore[operator]


def put_prefix(attention: nn.Module, keys: Tensor, values: Tensor) -> None:
    """Let every query of an attention module see a prefix of every text too, which is never quantized.

    Args:
        attention: equipped.
        keys: rotated, ``[kv_heads, tokens, head_dim]``, as of the positions before 0.
        values: of the same shape.
    """
    attention.register_buffer("prefix_key", keys)
    attention.register_buffer("prefix_value", values)


def behind_prefix(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys of a text behind those of the module's prefix, and the mask with columns for these, which all see."""
    assert isinstance(module.prefix_key, Tensor)
    keys, queries = key.shape[2], query.shape[2]
    key = _behind(module.prefix_key, key)
    if mask is None:
        if queries == 1:
            return key, None
        # Queries and keys are then of the same tokens.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril()
    return key, F.pad(mask, (module.prefix_key.shape[1], 0), value=mask.dtype == torch.bool)


def _behind(prefix: Tensor, states: Tensor) -> Tensor:
    """A prefix ``[kv_heads, p, head_dim]`` and then ``[batch, kv_heads, tokens, head_dim]``."""
    return torch.cat([prefix.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)


@contextmanager
def watched_scores(attention: nn.Module, see: Callable[[Scored], object]) -> Iterator[None]:
    """Show what the scores of every batch are made of to a function for a while."""
    attention.see_scored = see  # type: ignore[assignment]
    try:
        yield
    finally:
        del attention.see_scored


AttentionInterface.register(ATTENTION, kurtail_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
