"""Attention with rotated, quantized keys and values, through `transformers`' attention interface.

One function serves every family: it receives queries, keys and values after RoPE, rotates queries and keys (R3),
quantizes keys and values per token and head, and calls the stock attention. The cache itself holds float keys and
values: a per-token quantizer gives the same numbers whenever it is applied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.surgery.rotations import OnlineHadamard

ATTENTION = "kurtail"
"""Name of this attention in a model's configuration (`attn_implementation`)."""


def kurtail_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of ``[batch, heads, tokens, head_dim]`` queries on rotated and quantized keys.

    A module that `equip_attention` has not seen attends as usual.
    """
    rotation, keys, values = (getattr(module, name, None) for name in ("query_key_rotation", "keys", "values"))
    if rotation is not None:
        query, key = rotation(query), rotation(key)
    if keys is not None:
        key = fake_quantize(key, keys)
    if values is not None:
        value = fake_quantize(value, values)
    output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def equip_attention(
    attention: nn.Module, rotation: HadamardFactors | None, keys: Quantizer | None, values: Quantizer | None
) -> None:
    """Give an attention module what `kurtail_attention` reads from it."""
    attention.register_module("query_key_rotation", None if rotation is None else OnlineHadamard(rotation))
    attention.keys, attention.values = keys, values  # type: ignore[assignment]


AttentionInterface.register(ATTENTION, kurtail_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
