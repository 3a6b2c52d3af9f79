"""The first tokens kept finer, against one text decoded token by token by the plain model, whose cache is quantized."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, tiny_family
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods import PerTokenHead, Sinks
from kurtail_pl.surgery.attention import ATTENTION, equip_attention

TOKENS, PADDING = WINDOW + 12, 5
IDS = torch.randint(2, 300, (2, TOKENS), generator=torch.Generator().manual_seed(0))
CACHE = Quantizer(3, symmetric=False, clip=Clip(amount=0.9))
SINKS = [Sinks(1, 16), Sinks(3, 8)]


class QuantizedWhenWritten(DynamicCache):
    """A cache for one token at a time: the number of a write is the position of its token."""

    def __init__(self, sinks: Sinks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sinks, self.writes = sinks, dict[int, int]()

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        position = self.writes.get(layer, 0)
        self.writes[layer] = position + 1
        if position >= self.sinks.tokens:
            key, value = fake_quantize(key, CACHE), fake_quantize(value, CACHE)
        elif self.sinks.bits == 8:
            eight = Quantizer(8, symmetric=False)
            key, value = fake_quantize(key, eight), fake_quantize(value, eight)
        return super().update(key, value, layer, *args, **kwargs)


def token_by_token(family: str, ids: Tensor, sinks: Sinks) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of the plain model."""
    model = tiny_family(family).double()
    cache = QuantizedWhenWritten(sinks, config=model.config)
    return torch.cat([model(token.view(1, 1), past_key_values=cache).logits[0] for token in ids])


def equipped(family: str, sinks: Sinks | None) -> PreTrainedModel:
    model = tiny_family(family).double()
    model.set_attn_implementation(ATTENTION)
    for layer in model.model.layers:
        equip_attention(layer.self_attn, None, PerTokenHead(CACHE, CACHE, sinks))
    return model


def in_one(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(ids, attention_mask=mask, position_ids=positions).logits
    return logits


def in_pieces(make: Callable[..., Any], model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Some tokens at once, one after another, and the rest at once, through a cache."""
    cache, parts = make(config=model.config), []
    for start, stop in itertools.pairwise([0, 9, 10, 11, 12, 30, 31, ids.shape[1]]):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        piece = {"attention_mask": mask[:, :stop], "position_ids": positions, "past_key_values": cache}
        parts.append(model(ids[:, start:stop], **piece).logits)
    return torch.cat(parts, 1)


RUNS: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {
    "prefill": in_one,
    "cache": partial(in_pieces, DynamicCache),
    "static-cache": partial(in_pieces, partial(StaticCache, max_cache_len=TOKENS + 20)),
}


@pytest.mark.parametrize("sinks", SINKS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_a_padded_batch_equals_its_texts_token_by_token(family: str, run: str, side: str, sinks: Sinks) -> None:
    """Mistral's window is shorter than the text: its cache loses the first tokens."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    # The second text is shorter.
    padded, real = slice(PADDING), slice(PADDING, None)
    if side == "right":
        padded, real = slice(-PADDING, None), slice(-PADDING)
    ids[1, padded], mask[1, padded] = 1, 0
    logits = RUNS[run](equipped(family, sinks), ids, mask)
    for row, text in enumerate((slice(None), real)):
        expected = token_by_token(family, ids[row, text], sinks)
        torch.testing.assert_close(logits[row, text], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    # The sinks do something.
    assert (RUNS[run](equipped(family, None), ids, mask) - logits)[0].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_where_its_tokens_are(family: str) -> None:
    """Nothing is told: neither a mask nor positions. Not so long that longrope takes other factors at the end."""
    ids = IDS[0, :30]
    logits = equipped(family, SINKS[0])(ids.unsqueeze(0)).logits[0]
    expected = token_by_token(family, ids, SINKS[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_mask_that_is_added_to_the_scores() -> None:
    model = equipped("llama3", SINKS[0])
    added = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1).expand(1, 1, -1, -1)
    torch.testing.assert_close(model(IDS[:1], attention_mask=added).logits, model(IDS[:1]).logits, rtol=0, atol=1e-9)


def test_generation_of_a_padded_batch() -> None:
    ids, mask = IDS[:, :12].clone(), torch.ones(2, 12, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 1, 0
    model = equipped("llama3", SINKS[1])
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    found = torch.stack(made.logits, 1)
    for row, first in enumerate((0, PADDING)):
        expected = token_by_token("llama3", made.sequences[row, first:-1], SINKS[1])[-8:]
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinks(tokens=0), "sinks.tokens is 0; give 1 or more"),
        (lambda: Sinks(bits=4), "sinks.bits is 4; .* 8 or 16"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
