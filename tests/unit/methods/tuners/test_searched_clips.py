"""Searched clips against every ratio tried on the model by hand, in float64; artefacts; what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_family
from torch import Tensor
from transformers import PreTrainedModel

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods import NUQCache, PerTokenHead, SearchedClips
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

RATIOS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65]
PARTS = {"activations": Quantizer(3, False), "keys": Quantizer(2, False), "values": Quantizer(2)}
QUANTIZED = Scheme(None, PARTS["activations"], PerTokenHead(PARTS["keys"], PARTS["values"]))
ATTENTION = {f"self_attn.{name}_proj.activations" for name in "qkvo"}
MLP = {f"mlp.{name}_proj.activations" for name in ("gate", "up", "down")}


def searching(text: TextSpec, *parts: str) -> QuantizeSpec:
    text = replace(text, windows=9)
    return QuantizeSpec(QUANTIZED, text=text, quantized_activations=True, clips=SearchedClips(list(parts)))  # type: ignore[arg-type]


def clips_of(folder: Path) -> list[dict[str, float]]:
    clips: list[dict[str, float]] = json.loads((folder / "kurtail.json").read_text())["clips"]
    return clips


@torch.no_grad()
def outputs(model: PreTrainedModel, windows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a linear of the first layer reads and writes, ``[tokens, ...]``, in the windows that are searched."""
    read, written = [], []
    linear = model.model.layers[0].get_submodule(name)

    def see(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        read.append(linear.turn(arguments[0])[0])
        written.append(output[0] - (0 if linear.bias is None else linear.bias))

    with linear.register_forward_hook(see):
        for window in (windows[0], windows[8]):
            model(window.unsqueeze(0))
    return torch.cat(read), torch.cat(written)


def best(errors: dict[float, float]) -> float:
    """The least, which must stand out from the rest."""
    first, second = sorted(errors, key=errors.__getitem__)[:2]
    assert errors[first] < 0.9999 * errors[second]
    return first


def relative(found: Tensor, exact: Tensor) -> float:
    return sum(((f - e).norm() / e.norm()).item() ** 2 for f, e in zip(found, exact, strict=True))


@torch.no_grad()
def test_each_input_has_the_ratio_of_the_least_output_error(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """Of the first layer, whose attention reads what the float model's does; nothing is rounded before it."""
    clips = clips_of(quantize(fused, searching(text, "activations"), tmp_path / "searched"))
    windows = cut_windows(Checkpoint(fused), replace(text, windows=9), "calibration", seed=0).tokens
    model = kurtail_pl.load(fused).double()
    linears = [model.model.layers[0].get_submodule(f"self_attn.{name}_proj") for name in "qkv"]
    x, _ = outputs(model, windows, "self_attn.q_proj")
    weight = torch.cat([linear.weight for linear in linears])
    errors = {}
    for ratio in RATIOS:
        quantized = fake_quantize(x, Quantizer(3, False, Clip(amount=ratio)))
        errors[ratio] = relative(quantized @ weight.T, x @ weight.T)
    assert [set(layer) for layer in clips] == 4 * [ATTENTION | MLP]
    assert {clips[0][f"self_attn.{name}_proj.activations"] for name in "qkv"} == {best(errors)}
    assert len({ratio for layer in clips for ratio in layer.values()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("part", ["keys", "values"])
def test_the_cache_has_the_ratio_of_the_least_output_error(
    fused: Path, text: TextSpec, tmp_path: Path, part: str
) -> None:
    """Of the first layer, with activations in float: the other of keys and values is float too."""
    spec = searching(text, part)
    spec = replace(spec, scheme=replace(QUANTIZED, activations=None))
    clips = clips_of(quantize(fused, spec, tmp_path / "searched"))
    windows = cut_windows(Checkpoint(fused), replace(text, windows=9), "calibration", seed=0).tokens
    model = kurtail_pl.load(fused).double()
    _, exact = outputs(model, windows, "self_attn.o_proj")
    errors = {}
    for ratio in RATIOS:
        alone = {"keys": None, "values": None} | {part: replace(PARTS[part], clip=Clip(amount=ratio))}
        model.model.layers[0].self_attn.cache = PerTokenHead(**alone)
        errors[ratio] = relative(outputs(model, windows, "self_attn.o_proj")[1], exact)
    assert [set(layer) for layer in clips] == 4 * [{f"self_attn.{part}"}]
    assert clips[0][f"self_attn.{part}"] == best(errors)


def test_a_loaded_artefact_quantizes_with_the_ratios_that_were_found(
    fused: Path, text: TextSpec, tmp_path: Path
) -> None:
    folder = quantize(fused, searching(text, "activations", "keys", "values"), tmp_path / "searched")
    clips, model = clips_of(folder), kurtail_pl.load(folder)
    assert {len(layer) for layer in clips} == {9}
    for layer, ratios in zip(model.model.layers, clips, strict=True):
        for site, ratio in ratios.items():
            name, _, part = site.rpartition(".")
            module = layer.get_submodule(name)
            found = module.activations if part == "activations" else getattr(module.cache, part)
            assert found == replace(PARTS[part], clip=Clip(amount=ratio)), site


def test_every_expert_has_its_own_ratios(tied: Path, text: TextSpec, tmp_path: Path) -> None:
    tiny_family("mixtral").save_pretrained(tmp_path / "mixtral")
    Checkpoint(tied).tokenizer().save_pretrained(tmp_path / "mixtral")
    checkpoint = Checkpoint(tmp_path / "mixtral")
    fused = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    folder = quantize(fused, searching(text, "activations"), tmp_path / "searched")
    experts = {f"mlp.experts.{i}.{name}_proj.activations" for i in range(4) for name in ("gate", "up", "down")}
    assert [set(layer) for layer in clips_of(folder)] == 3 * [ATTENTION | experts]
    kurtail_pl.load(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchedClips([]), "clips.parts is empty; .* clips: null"),
        (lambda: SearchedClips(["queries"]), "parts is .*queries.*: Input should be"),  # type: ignore[list-item]
        (lambda: QuantizeSpec(clips=SearchedClips(["keys"])), "names keys; .* quantized_activations: true"),
        (
            lambda: QuantizeSpec(
                replace(QUANTIZED, cache=PerTokenHead(None)), quantized_activations=True, clips=SearchedClips()
            ),
            "names keys; .* scheme.cache.keys",
        ),
        (
            lambda: QuantizeSpec(
                replace(QUANTIZED, cache=NUQCache()), quantized_activations=True, clips=SearchedClips(["values"])
            ),
            "names values, and the cache keeps keys before RoPE.*, without clips: leave values out, or write .*Head",
        ),
        (
            lambda: QuantizeSpec(
                replace(QUANTIZED, cache=PerTokenHead(values=Quantizer(4, clip=Clip("quantile", 0.98)))),
                quantized_activations=True,
                clips=SearchedClips(["values"]),
            ),
            "scheme.cache.values.clip is a quantile; .* write clip.kind: ratio",
        ),
        (
            lambda: QuantizeSpec(
                replace(QUANTIZED, activation_scales="static"), quantized_activations=True, clips=SearchedClips()
            ),
            "names activations and .* static",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
