"""Artefacts with a side: nothing is lost before rounding, the full rank is the float model, and bytes are counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from logits import IDS
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.artefact.skeleton import skeleton, stored_bytes
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import LARGEST_LOSS
from kurtail_pl.methods import GPTQ, RTN, LowRank, Matching, Moments, Rounder, Side, Uniform
from kurtail_pl.methods.rounders import gptq as rounder_module
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.planning.sizes import sizes_of
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.passes import equipped
from kurtail_pl.stages.quantization.weights import Notes, WeightSolver
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.card import read_card, rotations_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import random_rotations


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def sides_of(folder: Path) -> dict[str, Tensor]:
    """The matrix of each linear's side, ``[out, in]``, by the names in the file alone."""
    tensors, found = weights_of(folder), {}
    for name in tensors:
        if name.endswith(".side_up"):
            linear = name.removesuffix(".side_up")
            block, _, last = linear.rpartition(".")
            first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last)
            found[linear] = tensors[name].double() @ tensors[f"{block}.{first}.side_down"].double()
    return found


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every weight that GPTQ is given, in order."""
    seen: list[Tensor] = []
    real: Callable[..., object] = rounder_module.gptq

    def record(weight: Tensor, *rest: object) -> object:
        seen.append(weight.clone())
        return real(weight, *rest)

    monkeypatch.setattr(rounder_module, "gptq", record)
    return seen


GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
"""Linears that read the same inputs."""


@pytest.mark.parametrize(("rounds", "by_attention"), [(1, False), (1, True), (2, False)])
def test_the_rest_and_the_side_are_the_weight(
    rounds: int, by_attention: bool, fused: Path, text: TextSpec, tmp_path: Path, rests: list[Tensor]
) -> None:
    """What GPTQ is given; where sides are compared, the rests of linears that read the same come together before."""
    spec = QuantizeSpec(Scheme(side=LowRank(4, rounds)), text=text, by_attention=by_attention)
    folder = quantize(fused, spec, tmp_path / "side")
    before, sides = weights_of(fused), sides_of(folder)
    assert len(sides) == 4 * 7
    given = iter(rests)
    for layer in range(4):
        for group in GROUPS:
            together = [next(given) for _ in range(rounds) if rounds > 1]
            for each in group:
                (name,) = (n for n in sides if n.startswith(f"model.layers.{layer}.") and n.endswith(each))
                weight, rest = before[f"{name}.weight"].double(), next(given)
                # The rest is held in float32.
                torch.testing.assert_close(rest.double() + sides[name], weight, rtol=2.0**-23, atol=2.0**-23)
                assert rest.norm() < 0.99 * weight.norm()
            assert all(len(stack) > len(rest) or len(group) == 1 for stack in together)
    assert not list(given)
    assert all(tensor.dtype == torch.float16 for name, tensor in weights_of(folder).items() if ".side_" in name)


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = kurtail_pl.load(folder)(IDS).logits
    return logits.double()


@pytest.mark.parametrize("rounder", [RTN(), GPTQ()], ids=str)
def test_the_full_rank_is_the_float_model(
    rounder: Rounder, tiny: Path, fused: Path, text: TextSpec, tmp_path: Path
) -> None:
    """Weights and inputs in 4 bits: what they multiply is what float16 lost of the sides."""
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny)(IDS).logits.double()
    scheme = Scheme(cache=None, side=LowRank(48))
    errors = []
    for side in (scheme.side, None):
        made = quantize(fused, QuantizeSpec(replace(scheme, side=side), rounder, text=text), tmp_path / str(side))
        errors.append(float((logits_of(made) - wanted).norm() / wanted.norm()))
    assert errors[0] < 2 * LARGEST_LOSS
    assert errors[1] > 0.05


def test_more_rank_and_more_rounds_leave_less(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """With everything that KurTail+ does to weights on the way: the rest is matched to its inputs, and refined."""
    given: dict[str, Any] = {"text": text, "quantized_activations": True, "matching": Matching(), "by_attention": True}
    float_model = logits_of(fused)

    def error(side: Side | None) -> float:
        spec = QuantizeSpec(Scheme(centre=True, side=side), GPTQ(refine=1), **given)
        folder = quantize(fused, spec, tmp_path / str(side))
        return float((logits_of(folder) - float_model).norm() / float_model.norm())

    none, some, more = (error(side) for side in (None, LowRank(8), LowRank(32)))
    assert more < some < none
    assert error(LowRank(8, rounds=6)) < none


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"])
def test_bytes_are_counted(family: str, tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """By the plan before there are any weights, by the check for room, and for the card; each side once."""
    tiny_family(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    checkpoint, side = Checkpoint(tmp_path / "model"), LowRank(3)
    rotated = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    scheme = Scheme(side=side)
    folder = quantize(rotated, QuantizeSpec(scheme, RTN(), text=text), tmp_path / "made")
    tensors = weights_of(folder)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    beside = sum(size for name, size in sizes.items() if ".side_" in name)
    assert side.cost(sizes_of(checkpoint.config)).disk == beside
    model = equipped(Checkpoint(rotated), FLOAT, rotations_of(rotated))
    assert stored_bytes(model, scheme) == sum(sizes.values())
    parts = ("codes", "scale", "side_up", "side_down")
    rounded = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in parts)
    linears = [each for each in skeleton(Checkpoint(folder)).modules() if isinstance(each, QuantizedLinear)]
    assert read_card(folder)["bits_per_weight"] == pytest.approx(
        8 * rounded / sum(linear.in_features * linear.out_features for linear in linears)
    )
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits.double(), logits_of(folder))


def test_a_model_too_narrow_for_the_rank_is_refused(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"side\.rank is 49 and the narrowest linears of this model read 48 channels"):
        quantize(fused, QuantizeSpec(Scheme(side=LowRank(49)), RTN()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_nearest_needs_the_text_for_a_weighted_side_alone(fused: Path, tmp_path: Path) -> None:
    weighted, plain = (QuantizeSpec(Scheme(side=LowRank(2, rounds=2, weighted=w)), RTN()) for w in (True, False))
    assert weighted.needs_text
    assert not plain.needs_text
    folder = quantize(fused, plain, tmp_path / "plain")
    assert json.loads((folder / "kurtail.json").read_text())["rounding"] == "rtn-low-rank"
    assert len(sides_of(folder)) == 4 * 7


def test_a_hessian_that_is_none_is_noted_and_the_weight_alone_decides() -> None:
    layer, notes = nn.Linear(5, 8, bias=False), Notes(fallbacks=[], borrowers=[], expert_tokens={})
    weight = layer.weight.detach().clone()
    linear = QuantizedLinear(layer.requires_grad_(False), None, None)
    broken = Moments(torch.diag(torch.tensor([1.0, 1, 1, 1, -1])).double(), None)
    WeightSolver(RTN(), None, LowRank(2, rounds=3), notes).take_side({"proj": linear}, broken, Uniform())
    assert notes["fallbacks"] == ["proj"]
    alone = QuantizedLinear(layer, None, None)
    plain = LowRank(2, rounds=3, weighted=False)
    WeightSolver(RTN(), None, plain, notes).take_side({"alone": alone}, Moments(None, None), Uniform())
    assert notes["fallbacks"] == ["proj"]
    assert linear.weight is not None
    assert alone.weight is not None
    assert torch.equal(linear.weight, alone.weight)
    assert not torch.equal(linear.weight, weight)
