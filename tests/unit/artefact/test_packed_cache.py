"""A packed cache against the float one, whose keys and values are quantized whenever they are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import RTN, CacheFormat, PerTokenHead, Q4_0Cache, SearchedClips, Sinks
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.surgery.packed_cache import keep_packed

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
CACHES = {
    "4 bits": PerTokenHead(),
    "centred": PerTokenHead(centre_keys=True),
    "symmetric keys, 8-bit values": PerTokenHead(Quantizer(4), Quantizer(8, False)),
    "groups": PerTokenHead(Quantizer(4, False, Clip(amount=0.9), 8), Quantizer(3, group_size=4)),
    "keys alone": PerTokenHead(values=None),
    "values alone": PerTokenHead(keys=None),
}


@pytest.fixture(scope="module")
def made(fused: Path, text: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An artefact whose weights are float, with a cache."""

    def make(cache: CacheFormat | None, **parts: Any) -> Path:
        spec = QuantizeSpec(Scheme(weights=None, cache=cache, **parts), RTN(), text=text)
        return quantize(fused, spec, tmp_path_factory.mktemp("artefacts") / "artefact")

    return make


def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    return kurtail_pl.load(folder, dtype="float32"), kurtail_pl.load(folder, dtype="float32", cache="packed")


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_text_in_pieces_has_the_same_logits(made: Callable[..., Path], cache: CacheFormat) -> None:
    floats, packed = both(made(cache))
    past: dict[str, Any] = {"floats": DynamicCache(), "packed": None}
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 24)):
        expected = floats(IDS[:, start:end], past_key_values=past["floats"])
        found = packed(IDS[:, start:end], past_key_values=past["packed"])
        past["packed"] = found.past_key_values
        # R3 turns all keys at once in the one and new ones in the other: a sum may have another order.
        limit = 1e-5 * expected.logits.abs().max().item()
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=limit)
        assert found.past_key_values.get_seq_length() == end


@pytest.mark.parametrize(("head_dim", "share"), [(64, 0.29), (128, 0.27)])
def test_four_bits_take_this_much_of_float16(head_dim: int, share: float) -> None:
    """4 bits a channel, and 40 for scale and zero point."""
    states = torch.randn(2, 3, 50, head_dim)
    stored = PerTokenHead().stored("keys", states)
    held = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert round(held / (2 * states.numel()), 2) == share


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
def test_generated_texts_are_the_same(made: Callable[..., Path], how: dict[str, Any]) -> None:
    """With a batch that is padded on the left, and with beams, whose texts change their places."""
    floats, packed = both(made(PerTokenHead()))
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    texts = []
    for model in (floats, packed):
        torch.manual_seed(1)
        texts.append(model.generate(IDS, attention_mask=mask, max_new_tokens=12, pad_token_id=1, **how))
    assert torch.equal(*texts)


def test_what_it_holds_is_codes(artefact: Path) -> None:
    found = kurtail_pl.load(artefact, cache="packed")(IDS).past_key_values
    for layer in found.layers:
        assert {name: tensor.dtype for name, tensor in layer.stored["keys"].items()} == {
            "codes": torch.uint8, "scale": torch.float32, "zero_point": torch.uint8,
        }  # fmt: skip
        assert layer.stored["values"]["codes"].shape == (2, 2, 24, 8)
        assert layer.bytes == 2 * (2 * 2 * 24) * (8 + 4 + 1)


def test_tokens_can_be_taken_back(made: Callable[..., Path]) -> None:
    packed = kurtail_pl.load(made(PerTokenHead()), cache="packed")
    past = packed(IDS).past_key_values
    past.crop(-4)
    assert past.get_seq_length() == 20
    again = packed(IDS[:, 20:], past_key_values=past).logits
    torch.testing.assert_close(again, packed(IDS).logits[:, 20:], rtol=0, atol=1e-4)


def test_clips_of_each_layer_and_a_prefix_are_kept(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    scheme = Scheme(weights=None, prefix=[1])
    spec = QuantizeSpec(scheme, RTN(), clips=SearchedClips(["keys", "values"]), text=text, quantized_activations=True)
    floats, packed = both(quantize(fused, spec, tmp_path / "clipped"))
    expected = floats(IDS).logits
    torch.testing.assert_close(packed(IDS).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_without_a_cache_nothing_is_packed(made: Callable[..., Path]) -> None:
    floats, packed = both(made(PerTokenHead()))
    found = packed(IDS, use_cache=False)
    assert found.past_key_values is None
    assert torch.equal(found.logits, floats(IDS, use_cache=False).logits)


@pytest.mark.parametrize("cache", [None, PerTokenHead(sinks=Sinks()), Q4_0Cache(keys=False)], ids=str)
def test_what_has_no_packed_form_is_refused(
    made: Callable[..., Path], artefact: Path, cache: CacheFormat | None
) -> None:
    if isinstance(cache, Q4_0Cache):  # Heads of the tiny model are too narrow for an artefact with it.
        model = kurtail_pl.load(artefact)
        attentions = [layer.self_attn for layer in model.model.layers]
        for attention in attentions:
            attention.cache = cache
        with pytest.raises(ConfigError, match=r"cache is packed, .*q4_0, which has no packed form"):
            keep_packed(model, attentions)
        return
    with pytest.raises(ConfigError, match=r"the artefact keeps keys .*, which has no packed form; leave cache out"):
        kurtail_pl.load(made(cache), cache="packed")


def test_another_word_is_refused(artefact: Path) -> None:
    with pytest.raises(ConfigError, match="cache is 'small'; give float or packed"):
        kurtail_pl.load(artefact, cache="small")  # type: ignore[arg-type]


def test_the_seam_is_whole() -> None:
    """What a format says that it packs it also stores and reads."""
    for cache in (*CACHES.values(), replace(PerTokenHead(), sinks=Sinks())):
        states = torch.randn(1, 2, 5, 16)
        if cache.packs:
            assert torch.equal(cache.read("values", cache.stored("values", states)), cache.kept_values(states, None))
            assert torch.equal(cache.read("keys", cache.stored("keys", states)), cache.kept_keys(states, None))
        else:
            assert cache.first_tokens
