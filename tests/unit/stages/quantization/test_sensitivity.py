"""Sensitivities against whole models with the same noise, and the linearity theorem on a real model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.errors import ResumeMismatch
from kurtail_pl.maths.normal_grid import normal_error
from kurtail_pl.methods import RTN, Normal, SensitiveBits
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize, sensitivity
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.quantization.sensitivity import NOISE, measured_sensitivities
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import random_rotations

pytestmark = pytest.mark.usefixtures("cache")
WEIGHTS_ONLY = Scheme(Normal(), activations=None, cache=None)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """More, and longer ones, than are used."""
    return torch.randint(300, (5, 300), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def loss(model: nn.Module, windows: Tensor) -> float:
    total = [F.cross_entropy(model(w[None]).logits[0, :-1].double(), w[1:], reduction="sum") for w in windows]
    return torch.stack(total).sum().item() / (windows.numel() - len(windows))


@torch.no_grad()
def test_sensitivities_are_those_of_whole_models(fused: Path, windows: Tensor) -> None:
    found = measured_sensitivities(Checkpoint(fused), windows, seed=3)
    used = windows[:4, :256]
    plain = loss(kurtail_pl.load(fused), used)
    for layer in (0, 2, 3):
        grown = []
        for sign in (1, -1):
            model, generator = kurtail_pl.load(fused), torch.Generator().manual_seed(3 * 4 + layer)
            for module in model.model.layers[layer].modules():
                if isinstance(module, QuantizedLinear):
                    noise = torch.randn(module.weight.shape, generator=generator)
                    noise *= sign * 0.1 * module.weight.norm() / noise.norm()
                    assert noise.norm() / module.weight.norm() == pytest.approx(NOISE**0.5)
                    module.weight += noise
            grown.append(loss(model, used) - plain)
        assert found[layer] == pytest.approx(sum(grown) / 2 / NOISE, rel=1e-3, abs=1e-4)
    assert len(found) == 4


def test_a_layer_that_writes_nothing_has_no_sensitivity(tiny: Path, windows: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    turned = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    found = measured_sensitivities(Checkpoint(turned), windows, seed=0)
    assert found[1] == 0
    assert 0 not in (found[0], found[2], found[3])
    assert SensitiveBits(4.0).bits(Normal(), found)[1] == 2


def test_an_interrupted_measurement_goes_on(
    fused: Path, windows: Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = measured_sensitivities(Checkpoint(fused), windows, seed=0)
    layers: list[int] = []
    real, calls = Walker.advance, 0

    def interrupted(self: Walker, layer: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        layers.append(layer.self_attn.layer_idx)
        return real(self, layer, hidden)

    monkeypatch.setattr(Walker, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured_sensitivities(Checkpoint(fused), windows, seed=0)
    stopped = layers[-1]
    layers.clear()
    assert measured_sensitivities(Checkpoint(fused), windows, seed=0) == undisturbed
    assert layers[0] == stopped > 0
    assert list((cache / "work").iterdir()) == []


def test_sensitivities_are_not_measured_again_after_an_interruption(
    fused: Path, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantizeSpec(WEIGHTS_ONLY, RTN(), bits=SensitiveBits(3.0), text=text)
    measured: list[object] = []
    real = LayerSolver.solve_layer

    def counted(*arguments: object) -> list[float]:
        measured.append(arguments)
        return [1.0, 2.0, 3.0, 90.0]

    def interrupted(self: LayerSolver, layer: nn.Module, prefix: str, *more: object) -> None:
        if prefix.endswith("2"):
            raise KeyboardInterrupt
        real(self, layer, prefix, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "measured_sensitivities", counted)
    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "solve_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(fused, spec, tmp_path / "out")
    with pytest.raises(ResumeMismatch, match=r"bits.settings.average is 3\.0, wanted 4\.0"):
        quantize(fused, replace(spec, bits=SensitiveBits(4.0)), tmp_path / "out")
    card = json.loads((quantize(fused, spec, tmp_path / "out") / "kurtail.json").read_text())
    assert len(measured) == 1
    assert card["sensitivities"] == [1.0, 2.0, 3.0, 90.0]


def told_by(model: Path, count: int, length: int) -> str:
    """Stories that a model tells itself."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    ids = network.generate(torch.ones(count, 1).long(), do_sample=True, top_k=0, max_new_tokens=length)
    return "\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))


def test_perplexity_grows_as_the_linearity_theorem_says(stories: Path, tmp_path: Path) -> None:
    """On a real model, and text of its own, whose gradient is small: four bits in all layers at once, from noise in one
    layer at a time."""
    (tmp_path / "told.txt").write_text(told_by(stories, 12, 250))
    text = TextSpec(str(tmp_path / "told.txt"), windows=8, seqlen=128)
    checkpoint = Checkpoint(stories)
    turned = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    folder = quantize(turned, QuantizeSpec(WEIGHTS_ONLY, RTN()), tmp_path / "four")
    before, after = (math.log(perplexity(Checkpoint(f), text)["perplexity"]) for f in (turned, folder))
    windows = cut_windows(checkpoint, text, "evaluation").tokens
    halves = [measured_sensitivities(Checkpoint(turned), half, seed=0) for half in windows.split(4)]
    predicted = sum(map(sum, halves)) / 2 * normal_error(4)
    assert after - before == pytest.approx(predicted, rel=0.3)
