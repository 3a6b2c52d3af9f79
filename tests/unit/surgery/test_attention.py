"""The rotated, quantized attention against transformers' own and against attention written out in float64."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.hadamard import random_hadamard_factors
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.surgery.attention import ATTENTION, equip_attention, subtract_from_keys
from kurtail_pl.surgery.equip import equip_model
from kurtail_pl.surgery.rotations import Rotations, random_rotations

IDS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)


def rotated(folder: Path, scheme: Scheme = FLOAT) -> PreTrainedModel:
    """Equipped with R3 alone."""
    model = plain(folder)
    equip_model(model, scheme, Rotations(query_key=random_rotations(model.config, 1).query_key))
    return model


def mask(padding: int) -> Tensor:
    """The second row is padded on the left."""
    ones = torch.ones_like(IDS)
    ones[1, :padding] = 0
    return ones


def decode(model: PreTrainedModel, attention_mask: Tensor, prefix: int) -> Tensor:
    """Logits of a prefix at once, then of one token after another through the cache."""
    cache = DynamicCache(config=model.config)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cuts = [0, prefix, *range(prefix + 1, IDS.shape[1] + 1)]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        output = model(
            IDS[:, start:stop],
            attention_mask=attention_mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
        )
        parts.append(output.logits)
    return torch.cat(parts, 1)


def prefill(model: PreTrainedModel, attention_mask: Tensor) -> Tensor:
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(IDS, attention_mask=attention_mask, position_ids=positions).logits


def assert_close_where_real(value: Tensor, expected: Tensor, attention_mask: Tensor, tolerance: float) -> None:
    real = attention_mask.bool()
    torch.testing.assert_close(value[real], expected[real], rtol=0, atol=tolerance * expected[real].abs().max().item())


@pytest.mark.parametrize("padding", [0, 5])
def test_r3_alone_changes_nothing(tiny: Path, padding: int) -> None:
    attention_mask = mask(padding)
    expected = prefill(plain(tiny), attention_mask)
    model = rotated(tiny)
    assert model.config._attn_implementation == ATTENTION
    assert_close_where_real(prefill(model, attention_mask), expected, attention_mask, 1e-6)
    assert_close_where_real(decode(model, attention_mask, 9), expected, attention_mask, 1e-6)


@pytest.mark.parametrize("padding", [0, 5])
def test_centred_keys_alone_change_nothing(tiny: Path, padding: int) -> None:
    attention_mask, model = mask(padding), rotated(tiny)
    expected = prefill(plain(tiny), attention_mask)
    for layer in model.model.layers:
        subtract_from_keys(layer.self_attn, 3 * torch.randn(KV_HEADS, 1, HEAD_DIM, dtype=torch.float64))
    assert_close_where_real(prefill(model, attention_mask), expected, attention_mask, 1e-6)
    assert_close_where_real(decode(model, attention_mask, 9), expected, attention_mask, 1e-6)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("prefix", [1, 9])
def test_cached_decoding_equals_prefill_with_quantized_cache(tiny: Path, padding: int, prefix: int) -> None:
    kv4 = Quantizer(4, symmetric=False, clip=Clip(amount=0.95))
    model, attention_mask = (
        rotated(tiny, Scheme(None, None, PerTokenHead(kv4, Quantizer(3, symmetric=False)))),
        mask(padding),
    )
    whole = prefill(model, attention_mask)
    assert_close_where_real(decode(model, attention_mask, prefix), whole, attention_mask, 1e-6)
    # The quantizers do something.
    assert (whole - prefill(plain(tiny), attention_mask))[attention_mask.bool()].abs().max() > 1e-2


def rope(x: Tensor) -> Tensor:
    """``[heads, tokens, head_dim]``: channels i and i + head_dim / 2 turned by position * 10000^(-2i / head_dim)."""
    half = HEAD_DIM // 2
    # The model holds frequencies and tables in float32.
    frequency = 1 / 10000 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def asymmetric(x: Tensor, bits: int, ratio: float) -> Tensor:
    """Each token of each head by itself: zero point an integer, zero on the grid."""
    out = torch.empty_like(x)
    top = 2**bits - 1
    for head in range(x.shape[0]):
        for token in range(x.shape[1]):
            row = x[head, token]
            low, high = min(row.min().item() * ratio, 0.0), max(row.max().item() * ratio, 0.0)
            scale = (high - low) / top
            zero = round(-low / scale)
            out[head, token] = (torch.clamp(torch.round(row / scale) + zero, 0, top) - zero) * scale
    return out


def by_hand(
    attention: torch.nn.Module, hidden: Tensor, rotation: Tensor | None, bits: tuple[int, int], centre: Tensor | None
) -> Tensor:
    """Causal attention of ``[tokens, hidden]``, one query head and one token at a time; the centre is added again."""

    def heads(linear: torch.nn.Linear, count: int) -> Tensor:
        return (hidden @ linear.weight.T + linear.bias).view(-1, count, HEAD_DIM).transpose(0, 1)

    query, key = rope(heads(attention.q_proj, HEADS)), rope(heads(attention.k_proj, KV_HEADS))
    value = heads(attention.v_proj, KV_HEADS)
    if rotation is not None:
        query, key = query @ rotation, key @ rotation
    offset = torch.zeros(KV_HEADS, 1, HEAD_DIM, dtype=torch.float64) if centre is None else centre
    key, value = asymmetric(key - offset, bits[0], 0.95) + offset, asymmetric(value, bits[1], 0.95)
    output = torch.empty(len(hidden), HEADS, HEAD_DIM, dtype=torch.float64)
    for head in range(HEADS):
        of = head // (HEADS // KV_HEADS)
        for t in range(len(hidden)):
            scores = torch.stack([query[head, t] @ key[of, s] / HEAD_DIM**0.5 for s in range(t + 1)])
            weights = scores.exp() / scores.exp().sum()
            output[t, head] = weights @ value[of, : t + 1]
    return output.flatten(1) @ attention.o_proj.weight.T + attention.o_proj.bias


@pytest.mark.parametrize("with_r3", [False, True])
@pytest.mark.parametrize("bits", [(4, 4), (3, 8)])
@pytest.mark.parametrize("centred", [False, True])
def test_quantized_keys_and_values_equal_attention_by_hand(
    tiny: Path, with_r3: bool, bits: tuple[int, int], centred: bool
) -> None:
    model = plain(tiny)
    model.set_attn_implementation(ATTENTION)
    attention = model.model.layers[1].self_attn
    factors = random_hadamard_factors(HEAD_DIM, torch.Generator().manual_seed(4)) if with_r3 else None
    keys, values = (Quantizer(b, symmetric=False, clip=Clip(amount=0.95)) for b in bits)
    equip_attention(attention, factors, PerTokenHead(keys, values))
    centre = None
    if centred:
        centre = torch.randn(KV_HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        subtract_from_keys(attention, centre)
    hidden = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    positions = model.model.rotary_emb(hidden, torch.arange(12).unsqueeze(0))
    output, _ = attention(hidden, position_embeddings=positions, attention_mask=None)
    expected = by_hand(attention, hidden[0], None if factors is None else factors.dense(), bits, centre)
    torch.testing.assert_close(output[0], expected, rtol=1e-9, atol=1e-9)


def test_attention_that_was_not_equipped_attends_as_usual(tiny: Path) -> None:
    model = plain(tiny)
    expected = model(IDS).logits
    model.set_attn_implementation(ATTENTION)
    assert torch.equal(model(IDS).logits, expected)
