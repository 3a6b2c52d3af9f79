"""Channel scales as fusion folds them, against what transformers' own modules read; wrong folds stop at the gate."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from families import tiny_family
from logits import change
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kurtail_pl.errors import ConfigError, GateError, TextError
from kurtail_pl.stages.fusion.scales import Part, ScaleSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.rotations import Rotations, random_rotations


def scaling(text: TextSpec, *parts: str) -> ScaleSpec:
    return ScaleSpec(list(parts or ("values", "mlp_hidden")), replace(text, windows=5, seqlen=40))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama3", "phi3", "mixtral", "smollm3"])
def test_scaled_channels_change_nothing(family: str, tied: Path, text: TextSpec, tmp_path: Path) -> None:
    """One model with biases, one whose projections are parts of others and of whose heads RoPE turns half, one of
    experts, one with layers without RoPE."""
    tiny_family(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    rotations = random_rotations(checkpoint.config, 2)
    plain = fuse(checkpoint, rotations, "test", tmp_path / "plain")
    folder = fuse(checkpoint, rotations, "test", tmp_path / "fused", scales=scaling(text, *get_args(Part)))
    assert change(tmp_path / "model", folder) < 1e-4
    down = next(name for name in Checkpoint(folder).names if "down_proj.weight" in name or ".w2.weight" in name)
    assert not torch.allclose(Checkpoint(folder).tensor(down), Checkpoint(plain).tensor(down), rtol=0.01)


@torch.no_grad()
def test_scales_balance_what_channels_hold_and_what_reads_them(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Against the inputs of transformers' own linears; without rotations the scales can be seen in the weights."""
    fused = Checkpoint(fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "fused", scales=scaling(text)))
    before = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    windows = cut_windows(Checkpoint(tiny), scaling(text).text, "calibration", seed=0).tokens
    for index, layer in enumerate(before.model.layers):
        read: dict[str, list[Tensor]] = {"self_attn.o_proj": [], "mlp.down_proj": []}
        for name, seen in read.items():
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].flatten(0, 1)))
        before(windows)
        energy, sums = {}, {}
        for name, seen in read.items():
            x = torch.cat(seen)
            energy[name] = (x / x.norm(dim=-1, keepdim=True)).square().mean(0)
            sums[name] = layer.get_submodule(name).weight.square().sum(0)
        # Three query heads read what each of two KV heads holds.
        by_head = [part["self_attn.o_proj"].view(2, 3, 16).sum(1).flatten() for part in (energy, sums)]
        expected = {
            "self_attn.v_proj": (by_head[1] / by_head[0]) ** 0.25,
            "mlp.up_proj": (sums["mlp.down_proj"] / energy["mlp.down_proj"]) ** 0.25,
        }
        for name, scale in expected.items():
            prefix = f"model.layers.{index}.{name}"
            linear = layer.get_submodule(name)
            for kind, values in {"weight": linear.weight[:, 0], "bias": linear.bias}.items():
                stored = fused.tensor(f"{prefix}.{kind}").double()
                found = (stored[:, 0] if kind == "weight" else stored) / values
                torch.testing.assert_close(found / found[0], scale / scale[0], rtol=1e-4, atol=0)


@torch.no_grad()
def test_scales_of_norms(tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path) -> None:
    """Against what transformers' own norms read, and the weights that read them without a scale; n = 48 channels."""
    spec = scaling(text, "attention_input", "mlp_input")
    plain = Checkpoint(fuse(Checkpoint(tiny), rotations, "test", tmp_path / "plain"))
    fused = Checkpoint(fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=spec))
    windows = cut_windows(plain, spec.text, "calibration", seed=0).tokens
    model, seen = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), []
    readers = {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", ("gate", "up"))}
    for layer in model.model.layers:
        for name in readers:
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    model(windows)
    for site, states in enumerate(seen):
        name = list(readers)[site % 2]
        layer, (block, linears) = f"model.layers.{site // 2}", readers[name]
        names = [f"{layer}.{block}.{linear}_proj.weight" for linear in linears]
        normed = states / (states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        deviation = (normed @ rotations.residual).std(0, correction=0)
        read = torch.cat([plain.tensor(n) for n in names]).double().square().sum(0)
        power = 2 * math.log(48)
        wanted = (read / deviation**power) ** (1 / (power + 2))
        scale = fused.tensor(f"{layer}.{name}.weight")
        # Eight bits of a significand: half of 2^-8 either way.
        torch.testing.assert_close(scale.double(), wanted / wanted.log().mean().exp(), rtol=1.001 * 2**-8, atol=0)
        assert torch.equal(scale, scale.bfloat16().float())
        assert torch.equal(scale, scale.half().float())
        for n in names:
            torch.testing.assert_close(fused.tensor(n) * scale, plain.tensor(n), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_scales_of_keys(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Against transformers' own queries and keys after RoPE; three query heads read each of two KV heads."""
    fused = Checkpoint(fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "f", scales=scaling(text, "keys")))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation="eager")
    windows = cut_windows(fused, scaling(text).text, "calibration", seed=0).tokens
    cache = model(windows).past_key_values
    for index, layer in enumerate(model.model.layers):
        states: list[Tensor] = []
        hook = layer.self_attn.q_proj.register_forward_hook(lambda _, x, y, seen=states: seen.append(y))
        model(windows)
        hook.remove()
        queries = states[0].view(-1, 2, 3, 2, 8).square().mean(0).sum((1, 2))
        keys = cache.layers[index].keys.transpose(0, 1).flatten(1, 2).var(1, correction=0).view(2, 2, 8).sum(1)
        scale = (queries / keys) ** 0.25
        scale = (scale / scale.log().mean(-1, keepdim=True).exp()).repeat(1, 2)
        for name, factor in {"k": scale.flatten(), "q": 1 / scale.repeat_interleave(3, 0).flatten()}.items():
            linear, prefix = layer.get_submodule(f"self_attn.{name}_proj"), f"model.layers.{index}.self_attn"
            weight, bias = (fused.tensor(f"{prefix}.{name}_proj.{kind}").double() for kind in ("weight", "bias"))
            torch.testing.assert_close(weight, linear.weight * factor.unsqueeze(1), rtol=1e-5, atol=0)
            torch.testing.assert_close(bias, linear.bias * factor, rtol=1e-5, atol=0)


def test_keys_with_norms_of_their_own_are_not_scaled(tied: Path, text: TextSpec, tmp_path: Path) -> None:
    tiny_family("qwen3").save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"qwen3 has norms behind q_proj and k_proj.* leave keys out"):
        fuse(Checkpoint(tmp_path / "model"), Rotations(), "none", tmp_path / "f", scales=scaling(text, "keys"))
    folder = fuse(
        Checkpoint(tmp_path / "model"), Rotations(), "none", tmp_path / "f", scales=scaling(text, "mlp_input")
    )
    assert change(tmp_path / "model", folder) < 1e-4


def test_channels_behind_an_activation_are_not_scaled(tied: Path, text: TextSpec, tmp_path: Path) -> None:
    tiny_family("apertus").save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"down_proj of apertus cannot be scaled: xIELU.*; leave mlp_hidden out"):
        fuse(checkpoint, Rotations(), "none", tmp_path / "f", scales=scaling(text, "mlp_hidden"))
    folder = fuse(checkpoint, Rotations(), "none", tmp_path / "f", scales=scaling(text, "values", "mlp_input"))
    assert change(checkpoint.folder, folder) < 1e-4


@torch.no_grad()
def test_scales_by_largest_magnitudes(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Against what transformers' own linears and cache hold, by SmoothQuant's and QServe's formulas."""
    spec = replace(scaling(text, "values", "mlp_hidden", "keys"), rule="absmax", alpha=0.3, key_alpha=0.8)
    fused = Checkpoint(fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "fused", scales=spec))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation="eager")
    windows = cut_windows(Checkpoint(tiny), spec.text, "calibration", seed=0).tokens
    for index, layer in enumerate(model.model.layers):
        read: dict[str, list[Tensor]] = {"self_attn.o_proj": [], "mlp.down_proj": []}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].flatten(0, 1)))
            for name, seen in read.items()
        ]
        keys = model(windows).past_key_values.layers[index].keys
        for hook in hooks:
            hook.remove()
        inputs = {name: torch.cat(seen).abs().amax(0) for name, seen in read.items()}
        weights = {name: layer.get_submodule(name).weight.abs().amax(0) for name in read}
        # Three query heads read what each of two KV heads holds.
        held, reads = (part["self_attn.o_proj"].view(2, 3, 16).amax(1).flatten() for part in (inputs, weights))
        of_keys = keys.abs().amax((0, 2)).view(2, 2, 8).amax(1).repeat(1, 2).flatten()
        expected = {
            "self_attn.v_proj": reads**0.7 / held**0.3,
            "mlp.up_proj": weights["mlp.down_proj"] ** 0.7 / inputs["mlp.down_proj"] ** 0.3,
            "self_attn.k_proj": of_keys**-0.8,
        }
        for name, scale in expected.items():
            stored = fused.tensor(f"model.layers.{index}.{name}.weight").double()
            found = stored[:, 0] / layer.get_submodule(name).weight[:, 0]
            # A KV head's keys have a mean of their own.
            heads = 2 if name.endswith("k_proj") else 1
            found, wanted = (x.view(heads, -1) / x.view(heads, -1)[:, :1] for x in (found, scale))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_largest_magnitudes_change_nothing(
    alpha: float, tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path
) -> None:
    """Behind rotations, norms scaled too."""
    spec = replace(scaling(text, *get_args(Part)), rule="absmax", alpha=alpha, key_alpha=alpha)
    folder = fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=spec)
    assert change(tiny, folder) < 1e-4


ALL = ["values", "mlp_hidden", "keys"]


@pytest.mark.parametrize(
    ("family", "parts"),
    [(family, parts) for family in ("llama3", "phi3", "mixtral") for parts in ([], ALL)] + [("apertus", ["values"])],
)
def test_reordered_channels_change_nothing(
    family: str, parts: list[Part], tied: Path, text: TextSpec, tmp_path: Path
) -> None:
    """Of linears with biases, of one that makes gate and up, of experts; under R1, which mixes none of them."""
    tiny_family(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    rotations = Rotations(residual=random_rotations(checkpoint.config, 2).residual)
    spec = replace(scaling(text), parts=parts, rule="absmax", reorder=["values", "mlp_hidden"])
    assert change(checkpoint.folder, fuse(checkpoint, rotations, "test", tmp_path / "fused", scales=spec)) < 1e-4


@torch.no_grad()
def test_channels_are_sorted_by_their_largest_magnitude(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """As transformers' own linears read them, before and after, the scales measured on the original order."""
    spec = replace(scaling(text), parts=[], reorder=["values", "mlp_hidden"])
    folder = fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "fused", scales=spec)
    windows = cut_windows(Checkpoint(tiny), spec.text, "calibration", seed=0).tokens
    found = []
    for path in (tiny, folder):
        model, seen = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64), []
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].abs().amax((0, 1))))
        model(windows)
        found.append(seen)
    for number, (before, after) in enumerate(zip(*found, strict=True)):
        if number % 2 == 0:
            # Three query heads read each of two KV heads, whose order is by the largest of the three.
            before, after = (x.view(2, 3, 16).amax(1) for x in (before, after))
        assert not torch.equal(before, before.sort(descending=True).values)
        torch.testing.assert_close(after, before.sort(descending=True).values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("part", "number"), [("values", "R2"), ("values", "R4"), ("mlp_hidden", "R5")])
def test_channels_that_a_rotation_mixes_are_not_reordered(
    part: str, number: str, tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path
) -> None:
    spec, field = replace(scaling(text), reorder=[part]), {"R2": "value", "R4": "attention_output", "R5": "mlp_hidden"}
    rotations = Rotations(**{field[number]: getattr(rotations, field[number])})
    with pytest.raises(ConfigError, match=rf"scales.reorder is \['{part}'\] and {number} mixes the channels of {part}"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=spec)


def test_parts_that_are_not_named_are_not_scaled(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    fused = Checkpoint(fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "fused", scales=scaling(text, "values")))
    original = Checkpoint(tiny)
    same = {name for name in original.names if torch.equal(fused.tensor(name), original.tensor(name))}
    changed = {name.split(".", 3)[3] for name in set(original.names) - same}
    assert changed == {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"}


def test_other_scales_are_fused_again(tiny: Path, text: TextSpec, rotations: Rotations, tmp_path: Path) -> None:
    made = []
    for scales in (None, scaling(text), scaling(text), scaling(text, "values")):
        folder = fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", overwrite=True, scales=scales)
        made.append((folder / "kurtail.json").stat().st_mtime_ns)
    assert made[1] == made[2]
    assert len(set(made)) == 3


def test_a_scale_for_the_wrong_heads_is_seen(
    tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = folding.scale_values

    def swapped(layer: torch.nn.Module, architecture: Architecture, scale: Tensor) -> None:
        right(layer, architecture, scale)
        output = folding.linear_of(layer, architecture.output)
        output.weight.data = output.weight.data.roll(16, 1)

    monkeypatch.setattr(folding, "scale_values", swapped)
    with pytest.raises(GateError, match=r"scaling the channels in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=scaling(text))
    assert list(tmp_path.iterdir()) == []


def test_a_scaled_norm_with_a_forgotten_reader_is_seen(
    tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = folding.norm_readers, []

    def forgetful(layer: torch.nn.Module, architecture: Architecture, norm: str) -> list[torch.nn.Module]:
        seen.append(norm)
        found = right(layer, architecture, norm)
        return found[:-1] if len(seen) > 2 else found  # Both norms are folded first.

    monkeypatch.setattr(folding, "norm_readers", forgetful)
    with pytest.raises(GateError, match=r"scaling the norms in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=scaling(text, "mlp_input"))
    assert list(tmp_path.iterdir()) == []


def test_scales_need_text_and_channels(tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="were asked for"):
        fuse(Checkpoint(tiny), rotations, "t", tmp_path / "f", scales=ScaleSpec(text=replace(text, windows=10**6)))
    for parts in ([], ["queries"]):
        with pytest.raises(ConfigError, match=r"scales.parts is \["):
            ScaleSpec(parts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scales.reorder is \['keys'\]; name some of values, mlp_hidden"):
        ScaleSpec(reorder=["keys"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"scales.rule is 'largest'; write balanced or absmax"):
        ScaleSpec(rule="largest")  # type: ignore[arg-type]
    for name in ("alpha", "key_alpha"):
        with pytest.raises(ConfigError, match=f"scales.{name} is 1.5; give a number from 0 to 1"):
            ScaleSpec(**{name: 1.5})
