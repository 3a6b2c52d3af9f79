"""Transforms trained block by block: what they give, what is stored of them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_family
from first_layer import FirstLayer
from shards import tensors_of
from torch import nn

import kurtail_pl
from kurtail_pl.artefact.source import Source
from kurtail_pl.cli.export import exporters
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import (
    GPTQ,
    NVFP4,
    NVINT4,
    RTN,
    BlockTransforms,
    LearnedClips,
    Moments,
    NUQCache,
    PerTokenHead,
    Uniform,
)
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import Compute
from kurtail_pl.surgery.rotations import Rotations, random_rotations

FOUR = Quantizer(4, False, Clip(amount=0.95))
ALL = Scheme(Uniform(), replace(FOUR, symmetric=True), PerTokenHead(FOUR, FOUR))
SETTINGS: dict[str, Any] = {"epochs": 4, "windows": 4, "seqlen": 48}


def training(text: TextSpec, scheme: Scheme = ALL, **settings: Any) -> QuantizeSpec:
    return QuantizeSpec(
        scheme, RTN(), text=text, quantized_activations=True, transforms=BlockTransforms(**{**SETTINGS, **settings})
    )


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "kurtail.json").read_text())
    return card


def first_layer(fused: Path, text: TextSpec) -> FirstLayer:
    return FirstLayer(fused, replace(text, windows=4, seqlen=48))


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with nothing fused."""
    return fuse(Checkpoint(tiny), Rotations(), "none", tmp_path_factory.mktemp("plain") / "fused")


def test_all_parts_together_beat_random_hadamards(plain: Path, fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """Behind the same Hadamards that they start from, untrained; the layer writes the same in both."""
    trained = quantize(plain, training(text, epochs=30), tmp_path / "trained")
    untrained = quantize(fused, replace(training(text), transforms=None), tmp_path / "untrained")
    one, other = first_layer(plain, text), first_layer(fused, text)
    assert one.error(kurtail_pl.load(trained)) < 0.9 * other.error(kurtail_pl.load(untrained))
    card = card_of(trained)
    places = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "keys", "values"}
    assert [set(layer) for layer in card["transforms"]] == 4 * [places]
    assert all(1 < condition < 10 for layer in card["transforms"] for condition in layer.values())
    assert [len(layer) for layer in card["clips"]] == 4 * [9]


def test_condition_numbers_are_those_of_the_stored_matrices(plain: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = quantize(plain, training(text, epochs=2), tmp_path / "out")
    stored, card = tensors_of(folder), card_of(folder)
    for index, layer in enumerate(card["transforms"]):
        for place, condition in layer.items():
            if place == "values":
                continue  # Fused: nothing is stored.
            name = "self_attn.key_transform" if place == "keys" else f"{place}.transform"
            left, right = (stored[f"model.layers.{index}.{name}.{side}"] for side in ("left", "right"))
            assert left.dtype == right.dtype == torch.float32
            dense = np.kron(left.double().numpy(), right.double().numpy())
            assert condition == pytest.approx(np.linalg.cond(dense), rel=1e-6)
    shape = {place: tuple(stored[f"model.layers.0.{place}.transform.left"].shape) for place in ("self_attn.o_proj",)}
    assert shape == {"self_attn.o_proj": (6, 6)}  # Over heads,
    assert torch.equal(stored["model.layers.0.self_attn.o_proj.transform.right"], torch.eye(16))  # and not within them.


@pytest.mark.parametrize("orthogonal", [True, False])
def test_orthogonal_maps_stay_so(plain: Path, text: TextSpec, tmp_path: Path, orthogonal: bool) -> None:
    folder = quantize(plain, training(text, parts=["transforms"], epochs=2, orthogonal=orthogonal), tmp_path / "out")
    found = [t for name, t in tensors_of(folder).items() if name.endswith(("transform.left", "transform.right"))]
    errors = [(t.T @ t - torch.eye(len(t))).abs().max().item() for t in found]
    assert (max(errors) < 1e-5) == orthogonal
    assert card_of(folder)["clips"] == []


@pytest.mark.parametrize("model", ["plain", "fused"])
def test_in_float_the_maps_change_nothing(model: str, plain: Path, fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """Trained for quantizers of keys and inputs that are then taken away."""
    source = {"plain": plain, "fused": fused}[model]
    scheme = replace(ALL, weights=None)
    spec = training(text, scheme, parts=["transforms", "diagonals"], epochs=2)
    folder = quantize(source, spec, tmp_path / "out")
    window = torch.arange(40)[None]
    mapped, reference = kurtail_pl.load(folder), kurtail_pl.load(source)
    for module in mapped.modules():
        module.activations = module.cache = None  # type: ignore[assignment]
    with torch.no_grad():
        one, other = mapped(window).logits, reference(window).logits
    # Weights of an artefact are float16.
    assert (one - other).abs().max() < 3e-3 * other.abs().max()
    assert card_of(folder)["transforms"][0]["mlp.down_proj"] > 1.001


def test_clips_alone_leave_no_maps(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = quantize(fused, training(text, parts=["clips", "weights"], epochs=20), tmp_path / "clips")
    assert card_of(folder)["transforms"] == []
    assert not [name for name in tensors_of(folder) if "transform" in name]
    untrained = quantize(fused, replace(training(text), transforms=None), tmp_path / "untrained")
    first = first_layer(fused, text)
    assert first.error(kurtail_pl.load(folder)) < 0.95 * first.error(kurtail_pl.load(untrained))


def test_rows_learn_what_their_grids_span(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """Against the search of each row's grid by the error of its weights."""
    scheme = replace(FLOAT, weights=Uniform(2))
    spec = replace(training(text, scheme, parts=["weights"], epochs=12, seqlen=48), quantized_activations=False)
    learned = quantize(fused, spec, tmp_path / "learned")
    sought = quantize(fused, replace(spec, transforms=None), tmp_path / "sought")
    first = first_layer(fused, text)
    assert first.error(kurtail_pl.load(learned)) < 0.97 * first.error(kurtail_pl.load(sought))


@pytest.mark.parametrize("group_size", [None, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_spans_a_share_of_each_rows_range(symmetric: bool, group_size: int | None) -> None:
    """By numpy, and both rounders take it."""
    generator = torch.Generator().manual_seed(0)
    weight, share = torch.randn(8, 24, generator=generator), torch.rand(8, 1, generator=generator) / 2 + 0.5
    spanning = Uniform(4, symmetric, group_size).spanning(share)
    rows = weight.numpy().reshape(8, -1, group_size or 24)
    low, high = np.minimum(rows.min(-1), 0) * share.numpy(), np.maximum(rows.max(-1), 0) * share.numpy()
    expected = np.abs(rows).max(-1) * share.numpy() / 7 if symmetric else (high - low) / 15
    hessian = torch.eye(24, dtype=torch.float64)
    for rounder in (RTN(), GPTQ()):
        found = rounder.codes(weight, spanning, Moments(hessian, None)).grid
        np.testing.assert_allclose(found.scale.numpy(), expected, rtol=1e-6)
    assert "_Spanning" not in Uniform.kinds()


def test_the_float_model_beside_has_the_maps_too(plain: Path, text: TextSpec, tmp_path: Path) -> None:
    """GPTAQ compares inputs behind the maps with the float model's, behind the same."""
    spec = replace(training(text, epochs=1), rounder=GPTQ(correction="gptaq"))
    folder = quantize(plain, spec, tmp_path / "gptaq")
    rounded = quantize(plain, training(text, epochs=1), tmp_path / "rtn")
    first = first_layer(plain, text)
    assert first.error(kurtail_pl.load(folder)) < first.error(kurtail_pl.load(rounded))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_have_maps_of_their_own(family: str, tied: Path, text: TextSpec, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path / "model")
    Checkpoint(tied).tokenizer().save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    fused = fuse(checkpoint, random_rotations(checkpoint.config, 0).keeping([]), "quarot", tmp_path / "fused")
    folder = quantize(fused, training(text, epochs=1), tmp_path / "out")
    experts = {f"mlp.experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "down")}
    assert [set(layer) for layer in card_of(folder)["transforms"]] == 3 * [
        experts | {"self_attn.q_proj", "self_attn.o_proj", "keys", "values"}
    ]
    assert isinstance(kurtail_pl.load(folder), nn.Module)


def test_a_packed_cache_holds_mapped_keys(plain: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = quantize(plain, training(text, parts=["transforms"], epochs=1), tmp_path / "out")
    prompt = torch.arange(20)[None]
    kept = [
        kurtail_pl.load(folder, cache=cache).generate(prompt, max_new_tokens=12, do_sample=False)
        for cache in ("float", "packed")
    ]
    assert torch.equal(*kept)


def test_half_precision_is_refused_before_any_work(plain: Path, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype is bfloat16 and transforms .*compute\.dtype: float32"):
        quantize(plain, training(text), tmp_path / "out", compute=Compute(dtype="bfloat16"))
    assert not list(tmp_path.iterdir())


def test_runtimes_without_maps_refuse_them_and_none_refuses_clips(
    plain: Path, fused: Path, text: TextSpec, tmp_path: Path
) -> None:
    mapped = Source(quantize(plain, training(text, parts=["transforms"], epochs=1), tmp_path / "mapped"))
    clipped = Source(quantize(fused, training(text, parts=["clips"], epochs=1), tmp_path / "clipped"))
    loaded = {name: point.load() for name, point in exporters().items()}
    assert set(loaded) == {"gguf", "onnx", "vllm"}
    assert loaded["onnx"]().refused(mapped) is None
    for name in ("gguf", "vllm"):
        found = loaded[name]().refused(mapped)
        assert "Kronecker maps with invertible factors" in found
        assert found.endswith("quantize with transforms: null, or use the artefact with kurtail_pl.load")
    assert loaded["onnx"]().refused(clipped) is None


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: BlockTransforms([]), "transforms.parts is empty; .* transforms: null"),
    (lambda: BlockTransforms(["keys"]), "parts is .*keys.*: Input should be"),  # type: ignore[list-item]
    (lambda: BlockTransforms(epochs=0), "transforms.epochs is 0; give a positive number"),
    (lambda: BlockTransforms(lr=-1.0), "transforms.lr is -1.0; give a positive number"),
    (
        lambda: QuantizeSpec(ALL, transforms=BlockTransforms()),
        "names activations.* quantized_activations: true",
    ),
    (
        lambda: QuantizeSpec(replace(ALL, weights=NVFP4()), RTN(), transforms=BlockTransforms()),
        "NVFP4.* trained for integers: write weights.class_path: kurtail_pl.methods.Uniform",
    ),
    (
        lambda: QuantizeSpec(replace(ALL, weights=NVINT4()), RTN(), transforms=BlockTransforms()),
        "trained for integers: write weights.class_path: kurtail_pl.methods.Uniform",
    ),
    (
        lambda: QuantizeSpec(
            replace(ALL, activations=Quantizer(4, levels="e2m1", scales="e8m0", group_size=32)),
            RTN(),
            quantized_activations=True,
            transforms=BlockTransforms(),
        ),
        "activations are 4-bit floating point.* write levels: integer and scales: float32",
    ),
    (
        lambda: QuantizeSpec(
            replace(ALL, cache=NUQCache()), RTN(), quantized_activations=True, transforms=BlockTransforms()
        ),
        "the cache keeps keys before RoPE.* write scheme.cache.class_path: kurtail_pl.methods.PerTokenHead",
    ),
    (lambda: QuantizeSpec(FLOAT, transforms=BlockTransforms()), "names weights and scheme.weights is null"),
    (lambda: QuantizeSpec(FLOAT, transforms=BlockTransforms(["transforms"])), "given and nothing is quantized"),
    (
        lambda: QuantizeSpec(replace(FLOAT, weights=Uniform()), transforms=BlockTransforms()),
        "names clips, and nothing but weights is quantized",
    ),
    (
        lambda: QuantizeSpec(replace(ALL, centre=True), quantized_activations=True, transforms=BlockTransforms()),
        "scheme.centre is given beside transforms, which are trained without",
    ),
    (
        lambda: QuantizeSpec(replace(ALL, prefix=[7]), quantized_activations=True, transforms=BlockTransforms()),
        "scheme.prefix is given beside transforms",
    ),
    (
        lambda: QuantizeSpec(ALL, quantized_activations=True, transforms=BlockTransforms(), clips=LearnedClips()),
        "clips and transforms are both given",
    ),
    (
        lambda: QuantizeSpec(
            replace(FLOAT, weights=Uniform()), transforms=BlockTransforms(["transforms"]), target="vllm"
        ),
        "computes no learned maps at run time: write quantization.transforms: null",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
