"""The search of alpha against every alpha of its grid, fused, rounded and run by transformers' own layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from logits import change
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.stages.fusion.alphas import alpha_errors
from kurtail_pl.stages.fusion.channels import Shares, Spread
from kurtail_pl.stages.fusion.scales import AlphaSearch, ScaleSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.card import read_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.rotations import Rotations, random_rotations

GROUP = 4
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def searching(text: TextSpec, per: str = "model") -> ScaleSpec:
    search = AlphaSearch(per, 0.25, Quantizer(3, symmetric=False, group_size=GROUP))  # type: ignore[arg-type]
    parts = ["values", "mlp_hidden", "attention_input", "mlp_input"]
    return ScaleSpec(parts, replace(text, windows=4, seqlen=32), rule="absmax", search=search)  # type: ignore[arg-type]


def rounded(weight: Tensor) -> Tensor:
    """Three bits between the extremes of each group and zero, group by group."""
    done = weight.clone()
    for row in done:
        for group in row.split(GROUP):
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            step = (high - low) / 7
            zero = round(-low / step)
            group.copy_(((group / step).round() + zero).clamp(0, 7).sub(zero) * step)
    return done


def states_of(model: PreTrainedModel, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer reads and writes."""
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, read, wrote: seen.append((read[0], wrote)))
    model(windows)
    return seen


def errors_of(folder: Path, states: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each layer with rounded weights, on what the original one reads: squares over squares, by tokens."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), []
    for layer, (before, after) in zip(model.model.layers, states, strict=True):
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                module.weight.data = rounded(module.weight.data)
        angles = model.model.rotary_emb(before, torch.arange(before.shape[1])[None])
        wrote = layer(before, position_embeddings=angles)
        found.append(float(((wrote - after).square().sum(-1) / after.square().sum(-1)).mean()))
    return found


@torch.no_grad()
def test_the_alpha_that_errs_least_is_taken(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    spec, checkpoint = searching(text), Checkpoint(tiny)
    windows = cut_windows(checkpoint, spec.text, "calibration", seed=0).tokens
    states = states_of(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), windows)
    errors = []
    for alpha in ALPHAS:
        made = fuse(
            checkpoint, Rotations(), "none", tmp_path / f"{alpha}", scales=replace(spec, alpha=alpha, search=None)
        )
        errors.append(errors_of(made, states))
    wanted = torch.tensor(errors).T
    of_model = fuse(checkpoint, Rotations(), "none", tmp_path / "model", scales=spec)
    note = read_card(of_model)["rotations"]["scales"]
    # In float32 one weight of many, half way between two codes, is rounded the other way.
    torch.testing.assert_close(torch.tensor(note["errors"]), wanted, rtol=5e-3, atol=0)
    best = ALPHAS[int(wanted.sum(0).argmin())]
    assert note["alpha"] == best
    of_block = fuse(checkpoint, Rotations(), "none", tmp_path / "block", scales=searching(text, "block"))
    assert read_card(of_block)["rotations"]["scales"]["alpha"] == [ALPHAS[i] for i in wanted.argmin(1).tolist()]
    same = Checkpoint(tmp_path / f"{best}")
    for name in same.names:
        assert torch.equal(Checkpoint(of_model).tensor(name), same.tensor(name))


@pytest.mark.parametrize("per", ["model", "block"])
def test_a_searched_alpha_changes_nothing(per: str, tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Behind rotations, which are fused in what is rounded, too."""
    rotations = random_rotations(Checkpoint(tiny).config, 2)
    folder = fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=searching(text, per))
    assert change(tiny, folder) < 1e-4


def test_an_interrupted_search_goes_on(tiny: Path, text: TextSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third layer; the second run starts there and finds the same errors."""
    checkpoint, spec = Checkpoint(tiny), searching(text)
    assert spec.search is not None
    windows = cut_windows(checkpoint, spec.text, "calibration", seed=0).tokens
    whole = alpha_errors(checkpoint, Rotations(), spec, spec.search, windows)
    advance, calls, each = Walker.advance, [], 4 * (1 + len(ALPHAS))

    def advance_or_die(self: Walker, layer: nn.Module, hidden: Tensor) -> Tensor:
        calls.append(layer)
        if len(calls) == 2 * each + 5:
            raise KeyboardInterrupt
        return advance(self, layer, hidden)

    monkeypatch.setattr(Walker, "advance", advance_or_die)
    with pytest.raises(KeyboardInterrupt):
        alpha_errors(checkpoint, Rotations(), spec, spec.search, windows)
    assert alpha_errors(checkpoint, Rotations(), spec, spec.search, windows) == whole
    assert len(calls) == 2 * each + 5 + 2 * each


def test_an_alpha_of_each_layer(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Each layer is what it is where its alpha is that of all."""
    spec = replace(searching(text), search=None)
    both = Checkpoint(
        fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "f", scales=replace(spec, alpha=[0.2, 0.7, 0.1, 0.9]))
    )
    for index, alpha in enumerate((0.2, 0.7, 0.1, 0.9)):
        folder = fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / f"{index}", scales=replace(spec, alpha=alpha))
        of_all, name = Checkpoint(folder), f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(both.tensor(name), of_all.tensor(name))
        other = f"model.layers.{3 - index}.mlp.down_proj.weight"
        assert not torch.equal(both.tensor(other), of_all.tensor(other))


@pytest.mark.parametrize("kind", [Shares, Spread])
def test_means_leave_massive_tokens_out(kind: type[Shares] | type[Spread]) -> None:
    rows, held = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), kind()
    massive = rows.clone()
    massive[7] *= 1000
    held.see(massive[:20])
    held.see(massive[20:])
    wanted = torch.cat([rows[:7], rows[8:]]).abs().mean(0)
    torch.testing.assert_close(held.mean, wanted)
    torch.testing.assert_close(held.largest, massive.abs().amax(0))


@torch.no_grad()
def test_scales_by_means(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Of what transformers' own norms read and linears hold, none of them massive here."""
    spec = ScaleSpec(["mlp_hidden", "mlp_input"], searching(text).text, rule="absmax", alpha=0.4, magnitudes="mean")
    plain = Checkpoint(fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "f", scales=spec))
    model, seen = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), []
    layer = model.model.layers[0]
    for module in (layer.post_attention_layernorm, layer.mlp.down_proj):
        module.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    model(cut_windows(Checkpoint(tiny), spec.text, "calibration", seed=0).tokens)
    states, hidden = seen
    normed = states / (states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    down = layer.mlp.down_proj.weight.abs().amax(0) ** 0.6 / hidden.abs().mean(0) ** 0.4
    up = plain.tensor("model.layers.0.mlp.up_proj.bias").double() / layer.mlp.up_proj.bias
    torch.testing.assert_close(up / up[0], down / down[0], rtol=1e-4, atol=0)
    norm, gain = plain.tensor("model.layers.0.post_attention_layernorm.weight"), layer.post_attention_layernorm.weight
    scaled_up = layer.mlp.up_proj.weight * (down / down.log().mean().exp()).unsqueeze(1)
    read = (torch.cat([layer.mlp.gate_proj.weight, scaled_up]) * gain).abs().amax(0)
    wanted = read**0.6 / normed.abs().mean(0) ** 0.4
    torch.testing.assert_close(norm.double(), wanted / wanted.log().mean().exp(), rtol=1.001 * 2**-8, atol=0)


def test_what_cannot_be_searched(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scales.search.per is 'layer'; write model or block"):
        AlphaSearch("layer")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scales.search.step is 0.0; give a number above 0"):
        AlphaSearch(step=0.0)
    for search, magnitudes in ((AlphaSearch(), "largest"), (None, "mean")):
        with pytest.raises(ConfigError, match=r"scales.rule is balanced, which has no alpha"):
            ScaleSpec(search=search, magnitudes=magnitudes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scales.magnitudes is 'median'; write largest or mean"):
        ScaleSpec(rule="absmax", magnitudes="median")  # type: ignore[arg-type]
    odd = replace(searching(text), search=AlphaSearch(rounding=Quantizer(group_size=7)))
    three = replace(searching(text), search=None, alpha=[0.5] * 3)
    for spec, said in (
        (odd, "scales.search.rounding.group_size is 7 and this model has 48 channels"),
        (three, "scales.alpha are 3 numbers and this model has 4 layers"),
    ):
        with pytest.raises(ConfigError, match=said):
            fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "f", scales=spec)


def test_alphas() -> None:
    assert AlphaSearch(step=0.05).alphas == [number / 20 for number in range(21)]
    assert AlphaSearch(step=0.3).alphas == [0.0, 0.3, 0.6, 0.9]
