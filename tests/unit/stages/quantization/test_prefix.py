"""A stored prefix against the same tokens in front of the text, run by the same model as any others."""

from pathlib import Path

import pytest
import torch
from families import tiny_family
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kurtail_pl
from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import RTN, PerTokenHead
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.prefix import prefix_states
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.attention import put_prefix
from kurtail_pl.surgery.rotations import random_rotations

PREFIX, PADDING = [7, 31, 5], 4
IDS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def in_front(ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor([PREFIX]).expand(len(ids), -1), ids], dim=1)


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a prefill, a chunk and single tokens, through the cache."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([9, 8, 1, 1, 1], 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama3", "phi3", "qwen3", "mixtral", "smollm3", "granite", "glm4_moe", "gpt_oss"])
def test_a_stored_prefix_is_tokens_in_front(family: str, tied: Path, tmp_path: Path) -> None:
    """In float64, rotary embeddings float32; at once, in pieces, and padded; all within the sliding windows."""
    fused = made(tiny_family(family), tied, tmp_path)
    plain, model = (whole_model(fused).double() for _ in range(2))
    for layer, states in zip(model.model.layers, prefix_states(fused, PREFIX, torch.float64, CPU), strict=True):
        put_prefix(layer.self_attn, *states)
    expected = plain(in_front(IDS)).logits[:, len(PREFIX) :]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_pieces(model, IDS), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(IDS).logits, expected, atol=1e-3)
    mask = torch.ones_like(IDS)
    mask[1, :PADDING] = 0
    padded = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    short = plain(in_front(IDS[1:, PADDING:])).logits[:, len(PREFIX) :]
    torch.testing.assert_close(padded[:1], expected[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1:, PADDING:], short, rtol=1e-5, atol=1e-5)


def made(model: PreTrainedModel, tied: Path, place: Path) -> Checkpoint:
    model.save_pretrained(place / "model")
    Checkpoint(tied).tokenizer().save_pretrained(place / "model")
    checkpoint = Checkpoint(place / "model")
    return Checkpoint(fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", place / "fused"))


@torch.no_grad()
def test_queries_that_grow_with_their_position_are_as_at_the_first(tied: Path, tmp_path: Path) -> None:
    """Positions before the first have no logarithm; here no position makes queries grow yet."""
    rope = {**tiny_family("ministral3").config.rope_parameters, "original_max_position_embeddings": 64}
    fused = made(tiny_family("ministral3", rope_parameters=rope), tied, tmp_path)
    plain, model = (whole_model(fused).double() for _ in range(2))
    for layer, states in zip(model.model.layers, prefix_states(fused, PREFIX, torch.float64, CPU), strict=True):
        put_prefix(layer.self_attn, *states)
    expected = plain(in_front(IDS)).logits[:, len(PREFIX) :]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("centre_keys", [False, True])
def test_an_artefact_holds_it(fused: Path, text: TextSpec, centre_keys: bool, tmp_path: Path) -> None:
    """Stored in float16, without quantizers; keys of prefix and text are centred alike."""
    eight = Quantizer(8, False)
    scheme = Scheme(None, None, PerTokenHead(eight, eight, centre_keys=centre_keys), prefix=PREFIX)
    folder = quantize(fused, QuantizeSpec(scheme, RTN(), text=text), tmp_path / "prefixed")
    model, plain = kurtail_pl.load(folder), kurtail_pl.load(fused)
    for layer in model.model.layers:
        assert layer.self_attn.prefix_key.shape == layer.self_attn.prefix_value.shape == (2, len(PREFIX), 16)
        layer.self_attn.cache = None
    expected = plain(in_front(IDS)).logits[:, len(PREFIX) :]
    assert (model(IDS).logits - expected).norm() < 3e-3 * expected.norm()
    assert (plain(IDS).logits - expected).norm() > 0.1 * expected.norm()


def test_the_prefix_is_not_quantized_and_the_text_is(fused: Path, tmp_path: Path) -> None:
    two = Quantizer(2, False)
    scheme = Scheme(None, None, PerTokenHead(two, two), prefix=PREFIX)
    model = kurtail_pl.load(quantize(fused, QuantizeSpec(scheme, RTN()), tmp_path / "prefixed"))
    states = list(prefix_states(Checkpoint(fused), PREFIX, torch.float32, CPU))
    for layer, (keys, values) in zip(model.model.layers, states, strict=True):
        torch.testing.assert_close(layer.self_attn.prefix_key, keys.half().float(), rtol=0, atol=0)
        torch.testing.assert_close(layer.self_attn.prefix_value, values.half().float(), rtol=0, atol=0)
        assert layer.self_attn.cache == PerTokenHead(two, two)


def test_generation_is_that_behind_the_tokens(fused: Path, tmp_path: Path) -> None:
    scheme = Scheme(None, None, None, prefix=PREFIX)
    model = kurtail_pl.load(quantize(fused, QuantizeSpec(scheme, RTN()), tmp_path / "prefixed"))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = IDS[:1]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    whole = in_front(ids)
    expected = kurtail_pl.load(fused).generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert torch.equal(found, expected[:, len(PREFIX) :])


def test_positions_before_the_first_are_refused_where_scores_tell_them(tied: Path, tmp_path: Path) -> None:
    """Norms with weights behind RoPE: scores of tokens moved along are others."""
    model = tiny_family("hunyuan").double()
    moved = torch.arange(IDS.shape[1]).unsqueeze(0) + 3
    assert (model(IDS, position_ids=moved).logits - model(IDS).logits).abs().max() > 1e-2
    fused = made(tiny_family("hunyuan"), tied, tmp_path)
    with pytest.raises(ConfigError, match=r"prefix is \[7, 31, 5\] and a hunyuan_v1_dense has norms .* prefix: null"):
        quantize(fused.folder, QuantizeSpec(Scheme(prefix=PREFIX), RTN()), tmp_path / "out")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [([], "prefix is empty"), ([1, 300], "prefix holds token 300; .*0 to 299"), ([-1], "prefix holds token -1")],
)
def test_tokens_that_the_model_does_not_know(fused: Path, prefix: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(fused, QuantizeSpec(Scheme(prefix=prefix), RTN()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_without_one_is_the_model_without_one(fused: Path) -> None:
    assert FLOAT.prefix is None
    assert getattr(kurtail_pl.load(fused).model.layers[0].self_attn, "prefix_key", None) is None
