"""Keys before RoPE, and values, kept where they are made: against transformers' own modules."""

import copy
import itertools

import pytest
import torch
from families import tiny_family
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kurtail_pl.methods import NUQCache
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.quantization.float_layer import set_aside
from kurtail_pl.surgery.attention import put_found
from kurtail_pl.surgery.before_rope import watched_states
from kurtail_pl.surgery.equip import equip_model, take_over
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import Rotations, head_dim_of, random_rotations

CACHE = NUQCache(3, 3, 0.05)
IDS = torch.randint(2, 300, (1, 20), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama3", "phi3", "qwen3", "hunyuan"]
"""Linears of their own with biases, one linear for all three, a norm of keys before RoPE, and one behind it."""


def equipped(family: str, scheme: Scheme, rotations: bool = False) -> PreTrainedModel:
    model = tiny_family(family).double()
    take_over(model)
    equip_model(model, scheme, random_rotations(model.config, 1) if rotations else Rotations())
    return model


def seen_in(family: str, ids: Tensor) -> list[dict[str, Tensor]]:
    """Keys before RoPE and values of each layer, ``[tokens, kv_heads, head_dim]``."""
    model, found = equipped(family, FLOAT), []
    architecture, width = architecture_of(model.config), head_dim_of(model.config)
    for index in range(model.config.num_hidden_layers):
        seen: dict[str, Tensor] = {}
        with watched_states(model.model.layers[index], architecture, width, seen.__setitem__):
            model(ids)
        found.append({part: states[0].transpose(0, 1) for part, states in seen.items()})
    return found


def fitted(family: str, cache: NUQCache) -> PreTrainedModel:
    model = equipped(family, Scheme(weights=None, activations=None, cache=cache))
    for layer, seen in zip(model.model.layers, seen_in(family, IDS), strict=True):
        put_found(layer.self_attn, cache.fitted(seen["keys"].float(), seen["values"].float()))
    return model


def behind_rope(model: PreTrainedModel, keys: Tensor) -> Tensor:
    """By the formula, on the channels of a head that it turns."""
    cosine, sine = (part.unsqueeze(1) for part in model.model.rotary_emb(keys, torch.arange(keys.shape[2])[None]))
    turned = keys[..., : cosine.shape[-1]]
    half = turned.chunk(2, -1)
    return torch.cat([turned * cosine + torch.cat([-half[1], half[0]], -1) * sine, keys[..., cosine.shape[-1] :]], -1)


def as_cached(model: PreTrainedModel, layer: nn.Module, keys: Tensor) -> Tensor:
    turned, norm = behind_rope(model, keys), getattr(layer.self_attn, "key_layernorm", None)
    return turned if norm is None else norm(turned)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_watched_is_what_transformers_caches(family: str) -> None:
    model, seen = tiny_family(family).double(), seen_in(family, IDS)
    for layer, cached, states in zip(model.model.layers, model(IDS).past_key_values.layers, seen, strict=True):
        keys, values = (states[part].transpose(0, 1)[None] for part in ("keys", "values"))
        torch.testing.assert_close(values, cached.values, rtol=0, atol=1e-6)
        torch.testing.assert_close(as_cached(model, layer, keys), cached.keys, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_they_are_found_while_what_reads_the_attention_is_set_aside(family: str) -> None:
    """As in calibration, which asks a layer's attention for the inputs of its output alone."""
    model, seen = equipped(family, FLOAT), dict[str, Tensor]()
    layer, architecture = model.model.layers[0], architecture_of(model.config)
    states = model.model.embed_tokens(IDS)
    positions = model.model.rotary_emb(states, torch.arange(IDS.shape[1])[None])
    with (
        set_aside(layer, architecture.output),
        watched_states(layer, architecture, head_dim_of(model.config), seen.__setitem__),
    ):
        layer.self_attn(layer.input_layernorm(states), position_embeddings=positions, attention_mask=None)
    for part, wanted in seen_in(family, IDS)[0].items():
        assert torch.equal(seen[part][0].transpose(0, 1), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_in_pieces_has_the_logits_of_the_whole(family: str) -> None:
    """What is kept of a token depends on that token alone."""
    model, past = fitted(family, CACHE), DynamicCache()
    whole = model(IDS).logits
    cuts = itertools.pairwise([0, 7, 8, 9, IDS.shape[1]])
    pieces = torch.cat([model(IDS[:, a:b], past_key_values=past).logits for a, b in cuts], 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    exact = equipped(family, FLOAT)(IDS).logits
    assert 1e-3 < ((whole - exact).norm() / exact.norm()).item() < 0.5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_reads_kept_keys_behind_rope(family: str) -> None:
    """What the first layer caches, against its float keys and values."""
    model, past = fitted(family, CACHE), DynamicCache()
    model(IDS, past_key_values=past)
    keys, values = (seen_in(family, IDS)[0][part].transpose(0, 1)[None] for part in ("keys", "values"))
    buffers = model.model.layers[0].self_attn.named_buffers(recurse=False)
    found = {name.removeprefix("cache_"): buffer for name, buffer in buffers}
    torch.testing.assert_close(past.layers[0].values, CACHE.kept_values(values, None, found), rtol=0, atol=1e-9)
    kept = CACHE.kept_keys(keys, None, found)
    expected = as_cached(model, model.model.layers[0], kept)
    torch.testing.assert_close(past.layers[0].keys, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_copy_is_kept_by_its_own_attention() -> None:
    model = fitted("llama3", CACHE)
    whole = model(IDS).logits
    other = copy.deepcopy(model)
    for layer in model.model.layers:
        nn.Module.__setattr__(layer.self_attn, "cache", None)
    assert torch.equal(other(IDS).logits, whole)
    assert not torch.equal(model(IDS).logits, whole)
