"""Attention on caches that runtimes turn by themselves: keys and values are turned, rounded and turned back."""

import itertools

import pytest
import torch
from families import tiny_family
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kurtail_pl.methods import CacheFormat, Int4PerTokenHead, Q4_0Cache
from kurtail_pl.surgery.attention import ATTENTION, equip_attention

CACHES = [Int4PerTokenHead(), Q4_0Cache()]
IDS = torch.randint(2, 300, (1, 20), generator=torch.Generator().manual_seed(0))


def attentions_of(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def equipped(cache: CacheFormat | None) -> PreTrainedModel:
    """Heads of 96: blocks of 32 are turned in the one, no blocks in the other."""
    model = tiny_family("phi3").double()
    model.set_attn_implementation(ATTENTION)
    for attention in attentions_of(model):
        equip_attention(attention, None, cache)
    return model


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.label)
def test_text_in_pieces_has_the_logits_of_the_whole(cache: CacheFormat) -> None:
    model, past = equipped(cache), DynamicCache()
    whole = model(IDS).logits
    cuts = itertools.pairwise([0, 7, 8, 9, IDS.shape[1]])
    pieces = torch.cat([model(IDS[:, a:b], past_key_values=past).logits for a, b in cuts], 1)
    # The states are float32 where they are rounded, and a sum of another order reaches no border here.
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    exact = equipped(None)(IDS).logits
    error = ((whole - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.3


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.label)
def test_values_alone_are_what_attention_mixes(cache: CacheFormat) -> None:
    """Rounded by hand where the linear writes them, in a model whose cache is float."""
    alone = cache.without("keys")
    assert alone is not None
    expected = equipped(None)
    for attention in attentions_of(expected):

        def rounded(module: nn.Module, given: tuple[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
            rest, values = states[..., :-96], states[..., -96:]
            return torch.cat([rest, cache.kept_values(values[:, None], None)[:, 0]], -1)

        attention.qkv_proj.register_forward_hook(rounded)
    logits = expected(IDS).logits
    torch.testing.assert_close(equipped(alone)(IDS).logits, logits, rtol=0, atol=1e-9 * logits.abs().max().item())
