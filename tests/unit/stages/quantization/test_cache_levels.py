"""What a calibration text decides of KVQuant's cache, against numpy on what transformers' own linears write."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import kurtail_pl
from kurtail_pl.methods import NUQCache
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.card import scheme_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations

CACHE = NUQCache(3, 2, 0.05)
SCHEME = Scheme(weights=None, activations=None, cache=CACHE)


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse(Checkpoint(tiny), Rotations(), "none", tmp_path_factory.mktemp("plain") / "plain")


def rounded(x: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    half, middle = (high - low) / 2, (high + low) / 2
    nearest = ((x - middle) / half).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return torch.where((x < low) | (x > high), x.half().double(), levels[nearest] * half + middle)


@torch.no_grad()
def test_thresholds_and_levels_of_a_layer(plain: Path, tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """The artefact holds them in float16; layer 1 is calibrated on what a layer 0 with a rounded cache writes."""
    folder = quantize(plain, QuantizeSpec(SCHEME, text=text, quantized_activations=True), tmp_path / "q")
    stored = {name: t for name, t in tensors_of(folder).items() if "cache_" in name}
    names = {"cache_key_low", "cache_key_high", "cache_key_levels", "cache_value_levels"}
    assert set(stored) == {f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in names}
    model, seen = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), {"k": [], "v": []}

    def keep(part: str, layer: int, x: Tensor) -> Tensor:
        found = {name: stored[f"model.layers.{layer}.self_attn.cache_{name}"].double() for name in names_of[part]}
        if part == "k":
            return rounded(x, *(found[name].flatten() for name in names_of[part]))
        ends = x.sort(-1).values  # One of 32 at each end, 2.5 % of them.
        return rounded(x, ends[..., 1:2], ends[..., -2:-1], found["value_levels"])

    names_of = {"k": ("key_low", "key_high", "key_levels"), "v": ("value_levels",)}
    for part, states in seen.items():
        first, second = (model.model.layers[i].self_attn.get_submodule(f"{part}_proj") for i in (0, 1))
        first.register_forward_hook(lambda _, x, y, part=part: keep(part, 0, y))
        second.register_forward_hook(lambda _, x, y, states=states: states.append(y.flatten(0, 1)))
    model(cut_windows(Checkpoint(plain), text, "calibration", seed=0).tokens)
    keys, prefix = torch.cat(seen["k"]), "model.layers.1.self_attn.cache_"
    beyond = round(len(keys) * 0.05 / 2)
    ordered = keys.sort(0).values
    low, high = ordered[beyond], ordered[-beyond - 1]
    for name, end in {"key_low": low, "key_high": high}.items():
        torch.testing.assert_close(stored[prefix + name].double().flatten(), end, rtol=2e-3, atol=2e-3)
    # No step of Lloyd's, nearest levels and then means, brings the stored ones much further.
    half, middle = (high - low) / 2, (high + low) / 2
    inside = (keys >= low) & (keys <= high)
    x, w = ((keys - middle) / half)[inside].numpy(), (half.square().expand_as(keys))[inside].numpy()
    levels = stored[prefix + "key_levels"].double().numpy()
    nearest = np.abs(x[:, None] - levels).argmin(1)
    means = np.array([np.average(x[nearest == i], weights=w[nearest == i]) for i in range(8)])
    np.testing.assert_allclose(levels, means, atol=0.02)


@torch.no_grad()
def test_an_artefact_is_what_was_evaluated(plain: Path, text: TextSpec, tmp_path: Path) -> None:
    """Behind a prefix, streaming layer by layer and loaded whole, and token by token."""
    spec = QuantizeSpec(replace(SCHEME, prefix=[7]), text=text)
    folder = quantize(plain, spec, tmp_path / "q")
    assert scheme_of(folder).cache == CACHE
    model, short = kurtail_pl.load(folder), replace(text, windows=2, seqlen=24)
    windows = cut_windows(Checkpoint(folder), short, "evaluation").tokens
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0]
        past, steps = None, []
        for token in window.split(1):
            out = model(token[None], past_key_values=past, use_cache=True)
            past, steps = out.past_key_values, [*steps, out.logits[0]]
        torch.testing.assert_close(torch.cat(steps), logits, rtol=0, atol=2e-4)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:]))
    found = perplexity(Checkpoint(folder), short)["perplexity"]
    assert found == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    plainly = AutoModelForCausalLM.from_pretrained(plain)
    assert not torch.allclose(plainly(windows[:1]).logits, model(windows[:1]).logits, atol=1e-3)
    with pytest.raises(kurtail_pl.errors.ConfigError, match="which has no packed form"):
        kurtail_pl.load(folder, cache="packed")
