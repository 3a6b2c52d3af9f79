"""Learned clips against all ratios of a grid, tried on the model in float64; artefacts; what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from families import tiny_family
from first_layer import FirstLayer
from shards import tensors_of
from torch import nn

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import GPTQ, NVFP4, RTN, Format, LearnedClips, Matching, Normal, PerTokenHead, Rounder, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

ACTIVATIONS = Scheme(weights=None, activations=Quantizer(3, False), cache=None)
CACHE = Scheme(weights=None, activations=None, cache=PerTokenHead(Quantizer(2, False), Quantizer(2)))
WEIGHTS = Scheme(weights=Uniform(3), activations=None, cache=None)
ALL = Scheme(Uniform(), Quantizer(4, False), PerTokenHead(Quantizer(4, False), Quantizer(4, False)))
SITES = [
    [f"self_attn.{name}_proj.activations" for name in "qkv"],
    ["self_attn.o_proj.activations"],
    ["mlp.gate_proj.activations", "mlp.up_proj.activations"],
    ["mlp.down_proj.activations"],
]
CACHED = ["self_attn.keys", "self_attn.values"]


def learning(text: TextSpec, scheme: Scheme, *parts: str, steps: int = 40, lr: float = 0.03) -> QuantizeSpec:
    clips = LearnedClips(list(parts), steps, lr, text.windows or 0, text.seqlen)  # type: ignore[arg-type]
    return QuantizeSpec(scheme, text=text, quantized_activations=scheme != WEIGHTS, clips=clips)


def clips_of(folder: Path) -> list[dict[str, float]]:
    clips: list[dict[str, float]] = json.loads((folder / "kurtail.json").read_text())["clips"]
    return clips


def put(layer: nn.Module, clips: dict[str, float], scheme: Scheme) -> None:
    for place, ratio in clips.items():
        name, _, part = place.rpartition(".")
        module, clip = layer.get_submodule(name), Clip(amount=ratio)
        if part == "activations":
            module.activations = replace(scheme.activations, clip=clip)
        else:
            quantizer = replace(getattr(scheme.cache, part), clip=clip)
            module.cache = replace(module.cache or scheme.cache, **{part: quantizer})


def test_clips_learn_most_of_what_the_best_of_all_have(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """One for each of four sites, learned together, against all 625 of a grid: these also fit the very roundings."""
    folder = quantize(fused, learning(text, ACTIVATIONS, "activations"), tmp_path / "learned")
    clips = clips_of(folder)
    assert [set(layer) for layer in clips] == 4 * [{place for site in SITES for place in site}]
    first, model = FirstLayer(fused, text), kurtail_pl.load(fused)
    layer, errors = model.model.layers[0], {}
    for ratios in product([0.6, 0.7, 0.8, 0.9, 1.0], repeat=4):
        put(layer, {place: r for site, r in zip(SITES, ratios, strict=True) for place in site}, ACTIVATIONS)
        errors[ratios] = first.error(model)
    put(layer, clips[0], ACTIVATIONS)
    best, start = min(errors.values()), errors[1.0, 1.0, 1.0, 1.0]
    assert best < 0.8 * start
    assert start - first.error(model) > 0.75 * (start - best)


def test_the_cache_learns_too(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = quantize(fused, learning(text, CACHE, "keys", "values"), tmp_path / "learned")
    clips = clips_of(folder)
    first, model = FirstLayer(fused, text), kurtail_pl.load(fused)
    errors = {}
    for ratios in product([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], repeat=2):
        put(model.model.layers[0], dict(zip(CACHED, ratios, strict=True)), CACHE)
        errors[ratios] = first.error(model)
    put(model.model.layers[0], clips[0], CACHE)
    assert clips[0].keys() == set(CACHED)
    best, start = min(errors.values()), errors[1.0, 1.0]
    assert best < 0.8 * start
    assert start - first.error(model) > 0.75 * (start - best)


@pytest.mark.parametrize(
    ("weights", "rounder"),
    [
        (Uniform(3), RTN()),
        (Uniform(3), GPTQ()),
        (Normal(3), RTN()),
        (Normal(3), GPTQ()),
        (Uniform(3, scales="float16"), RTN()),
        (Uniform(3, False, scales="float16"), RTN()),
    ],
)
def test_scales_learn_and_codes_stay(
    fused: Path, text: TextSpec, tmp_path: Path, weights: Format, rounder: Rounder
) -> None:
    """Of the first layer, whose inputs are the same with and without."""
    spec = replace(learning(text, replace(WEIGHTS, weights=weights), "weights", lr=0.005), rounder=rounder)
    learned = quantize(fused, spec, tmp_path / "learned")
    plain = quantize(fused, replace(spec, clips=None), tmp_path / "plain")
    first = FirstLayer(fused, text)
    assert first.error(kurtail_pl.load(learned)) < 0.97 * first.error(kurtail_pl.load(plain))
    one, other = tensors_of(learned), tensors_of(plain)
    assert one.keys() == other.keys()
    changed = {
        name.rpartition(".")[2] for name in one if "layers.0" in name and not torch.equal(one[name], other[name])
    }
    assert changed == {"scale"}
    if isinstance(weights, Uniform) and weights.scales == "float16":
        for name in (name for name in one if name.endswith(".scale")):
            zeros = one.get(name.replace(".scale", ".zero_point"), torch.ones(1))
            for held in (one[name], one[name] * zeros):
                assert torch.equal(held.half().float(), held)


def test_steps_of_no_size_change_nothing(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """Learning itself leaves no trace in the layer: every tensor is that of an artefact without it."""
    scheme = replace(ALL, cache=replace(ALL.cache, centre_keys=True), centre=True, prefix=[7])
    spec = learning(text, scheme, "activations", "keys", "values", "weights", steps=2, lr=1e-30)
    spec = replace(spec, matching=Matching())
    learned = tensors_of(quantize(fused, spec, tmp_path / "learned"))
    plain = tensors_of(quantize(fused, replace(spec, clips=None), tmp_path / "plain"))
    assert learned.keys() == plain.keys()
    assert all(torch.equal(learned[name], plain[name]) for name in plain)


def test_a_loaded_artefact_quantizes_with_the_ratios_that_were_learned(
    fused: Path, text: TextSpec, tmp_path: Path
) -> None:
    folder = quantize(fused, learning(text, ALL, "activations", "keys", "values", steps=3), tmp_path / "learned")
    clips, model = clips_of(folder), kurtail_pl.load(folder)
    by_hand = kurtail_pl.load(folder)
    for layer, ratios in zip(by_hand.model.layers, clips, strict=True):
        assert len(ratios) == 9
        assert 1 not in ratios.values()
        put(layer, dict.fromkeys(ratios, 1.0), ALL)
    window = torch.arange(20)[None]
    logits = model(window).logits
    assert not torch.equal(by_hand(window).logits, logits)
    for layer, ratios in zip(by_hand.model.layers, clips, strict=True):
        put(layer, ratios, ALL)
    assert torch.equal(by_hand(window).logits, logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_learn(family: str, tied: Path, text: TextSpec, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path / "model")
    Checkpoint(tied).tokenizer().save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    fused = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    spec = learning(text, ALL, "activations", "weights", steps=3)
    folder = quantize(fused, spec, tmp_path / "learned")
    experts = {f"mlp.experts.{i}.{name}_proj.activations" for i in range(4) for name in ("gate", "up", "down")}
    attention = {place for site in SITES[:2] for place in site}
    assert [set(layer) for layer in clips_of(folder)] == 3 * [attention | experts]
    kurtail_pl.load(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedClips([]), "clips.parts is empty; .* clips: null"),
        (lambda: LearnedClips(["queries"]), "parts is .*queries.*: Input should be"),  # type: ignore[list-item]
        (lambda: LearnedClips(steps=0), "clips.steps is 0; give a positive number"),
        (lambda: LearnedClips(lr=-1.0), "clips.lr is -1.0; give a positive number"),
        (
            lambda: QuantizeSpec(clips=LearnedClips(["keys"])),
            "parts names keys; .* quantized_activations: true",
        ),
        (
            lambda: QuantizeSpec(WEIGHTS, quantized_activations=True, clips=LearnedClips(["values"])),
            "parts names values; .* give scheme.cache.values",
        ),
        (
            lambda: QuantizeSpec(CACHE, clips=LearnedClips(["weights"])),
            "names weights and scheme.weights is null",
        ),
        (
            lambda: QuantizeSpec(Scheme(NVFP4()), RTN(), clips=LearnedClips(["weights"])),
            "parts names weights, and they are NVFP4.* no plain numbers; leave weights out",
        ),
        (
            lambda: QuantizeSpec(
                replace(ALL, activations=Quantizer(4, clip=Clip("quantile", 0.98))),
                quantized_activations=True,
                clips=LearnedClips(["activations"]),
            ),
            "scheme.activations.clip is a quantile; .* write clip.kind: ratio",
        ),
        (
            lambda: QuantizeSpec(
                replace(ALL, activation_scales="static"),
                quantized_activations=True,
                clips=LearnedClips(["activations"]),
            ),
            "parts names activations and .* static",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
