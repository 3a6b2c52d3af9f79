"""Tokens that count by the attention they get, against what transformers' eager implementation says of attention."""

from pathlib import Path

import pytest
import torch
from families import tiny_family
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.calibration import received_by
from kurtail_pl.stages.quantization.prefix import prefix_states
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import put_prefix
from kurtail_pl.surgery.equip import empty_model, equip_model
from kurtail_pl.surgery.rotations import random_rotations

WEIGHTS = Scheme(Uniform(4), activations=None, cache=None)
PREFIX = [7, 31, 5]


@torch.no_grad()
def eager_counts(model: PreTrainedModel, window: Tensor, prefix: int = 0) -> list[Tensor]:
    """Of each layer, the squared attention of all heads and queries to each token behind the prefix, ``[tokens]``."""
    attentions = model(window[None], output_attentions=True).attentions
    return [a[0, :, prefix:, prefix:].square().sum((0, 1)) for a in attentions]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["text", "prefix"])
@pytest.mark.parametrize("family", ["llama3", "mistral", "gpt_oss"])
def test_counts_of_a_text(family: str, prefix: list[int], tied: Path, tmp_path: Path) -> None:
    """Without a prefix, longer than the sliding window; keys have so coarse a quantizer that counts would tell.

    In one family a part of the attention goes to no token.
    """
    model = tiny_family(family)
    window = torch.randint(300, (20 if prefix else 40,), generator=torch.Generator().manual_seed(0))
    checkpoint = saved(model, tied, tmp_path / "model")
    rotations = random_rotations(checkpoint.config, 0)
    fused = Checkpoint(fuse(checkpoint, rotations, "quarot", tmp_path / "fused"))
    equipped = empty_model(checkpoint.config)
    equip_model(equipped, Scheme(None, None, PerTokenHead(Quantizer(2), None)), rotations)
    walker = Walker(fused, equipped)
    with resumable_folder(tmp_path / "work", False, {}) as work:
        hidden = walker.hidden_states(window[None], work)
        _, layer = next(walker.layers("test", work))
        if prefix:
            put_prefix(layer.self_attn, *next(iter(prefix_states(fused, prefix, torch.float32, walker.device))))
        attended = (layer.self_attn(layer.input_layernorm(x), **walker.positions(layer, x))[0] for x in hidden.before)
        (found,) = received_by(layer.self_attn, attended)
    model.set_attn_implementation("eager")
    expected = eager_counts(model, torch.cat([torch.tensor(prefix, dtype=torch.long), window]), len(prefix))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def saved(model: PreTrainedModel, tied: Path, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    Checkpoint(tied).tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


@torch.no_grad()
def rows_and_counts(tiny: Path, fused: Path, text: TextSpec) -> tuple[Tensor, Tensor]:
    """What `v_proj` of the first fused layer reads, float64 ``[tokens, in]``, and what each token counts for."""
    windows = cut_windows(Checkpoint(fused), text, "calibration", seed=0).tokens
    model, rows = kurtail_pl.load(fused), []
    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    eager = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    counts = []
    for window in windows:
        model(window[None])
        counts.append(eager_counts(eager, window)[0].double())
    return torch.cat(rows), torch.cat(counts)


def test_the_hessian_of_values_counts_tokens(
    tiny: Path, fused: Path, text: TextSpec, tmp_path: Path, hessians: list[Tensor]
) -> None:
    """The others', of queries and keys, are as without."""
    quantize(fused, QuantizeSpec(WEIGHTS, text=text, by_attention=True), tmp_path / "made")
    rows, counts = rows_and_counts(tiny, fused, text)
    assert counts.max() > 10 * counts.median()
    for hessian, expected in zip(
        hessians, (rows.T @ rows, rows.T @ rows, rows.T @ (counts[:, None] * rows)), strict=False
    ):
        assert (hessian - expected).norm() < 1e-4 * expected.norm()
    assert len(hessians) == 4 * 7


def test_errors_of_values_as_they_are_attended_to_are_less(
    tiny: Path, fused: Path, text: TextSpec, tmp_path: Path
) -> None:
    rows, counts = rows_and_counts(tiny, fused, text)
    exact, errors = kurtail_pl.load(fused).model.layers[0].self_attn.v_proj.weight.double(), {}
    for by_attention in (False, True):
        spec = QuantizeSpec(WEIGHTS, text=text, by_attention=by_attention)
        made = kurtail_pl.load(quantize(fused, spec, tmp_path / str(by_attention)))
        change = rows @ (made.model.layers[0].self_attn.v_proj.dense_weight().double() - exact).T
        errors[by_attention] = (counts @ change.square().sum(1)).item()
    assert errors[True] < 0.9 * errors[False]


def test_values_of_a_linear_that_makes_queries_too_are_refused(tied: Path, text: TextSpec, tmp_path: Path) -> None:
    checkpoint = saved(tiny_family("phi3"), tied, tmp_path / "model")
    fused = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    with pytest.raises(ConfigError, match="qkv_proj of phi3 makes queries and keys too"):
        quantize(fused, QuantizeSpec(WEIGHTS, text=text, by_attention=True), tmp_path / "made")
    assert not (tmp_path / "made").exists()
