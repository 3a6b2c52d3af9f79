"""Fused folders against transformers' own logits; wrong rotations and folds stop at the gate and leave nothing."""

import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from families import tiny_family
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.errors import ArtefactError, ConfigError, DiskFull, GateError, TextError, UnsupportedArchitecture
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.stages.fuse import _Fuser, fuse
from kurtail_pl.stages.scales import Part, ScaleSpec
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import INDEX, Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.rotation_file import FILE
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.rotations import Rotations, random_rotations
from kurtail_pl.surgery.scheme import FLOAT

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
PARTS = ("residual", "value", "query_key", "attention_output", "mlp_hidden")


def change(original: Path, fused: Path) -> float:
    """Largest change of the logits, relative to the largest logit."""
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(original)(IDS).logits
        value = kurtail_pl.load(fused)(IDS).logits
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("which", ["tiny", "tied", "stories"])
def test_logits_are_the_originals(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(which)
    rotations = random_rotations(AutoConfig.from_pretrained(folder), 5)
    assert change(folder, fuse(Checkpoint(folder), rotations, "quarot", tmp_path / "fused")) < 1e-4


@pytest.mark.parametrize("kept", [(), *[(part,) for part in PARTS], ("value", "query_key", "mlp_hidden")])
def test_each_rotation_alone(tiny: Path, rotations: Rotations, tmp_path: Path, kept: tuple[str, ...]) -> None:
    chosen = Rotations(**{part: getattr(rotations, part) for part in kept})
    assert change(tiny, fuse(Checkpoint(tiny), chosen, "test", tmp_path / "fused")) < 1e-4


def test_value_rotations_of_each_kv_head(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    value = rotations.value
    assert value is not None
    per_head = torch.stack([value, value.flip(0)], 1)
    chosen = replace(rotations, value=per_head)
    assert change(tiny, fuse(Checkpoint(tiny), chosen, "test", tmp_path / "fused")) < 1e-4


def test_without_rotations_the_weights_are_the_originals(tied: Path, tmp_path: Path) -> None:
    original, fused = Checkpoint(tied), Checkpoint(fuse(Checkpoint(tied), Rotations(), "rtn", tmp_path / "fused"))
    assert set(fused.names) == {*original.names, "lm_head.weight"}
    assert original.config.tie_word_embeddings
    assert not fused.config.tie_word_embeddings
    for name in original.names:
        assert torch.equal(fused.tensor(name), original.tensor(name)), name
    assert torch.equal(fused.tensor("lm_head.weight"), original.tensor("model.embed_tokens.weight"))


def test_the_embedding_is_rotated_and_not_centred(tiny: Path, fused: Path, rotations: Rotations) -> None:
    embedding = Checkpoint(tiny).tensor("model.embed_tokens.weight").double()
    assert embedding.mean(-1).abs().min() > 0.01
    written = Checkpoint(fused).tensor("model.embed_tokens.weight")
    assert torch.equal(written, (embedding @ rotations.residual).float())


def test_norms_are_folded_and_weights_float32(fused: Path) -> None:
    checkpoint = Checkpoint(fused)
    norms = [name for name in checkpoint.names if "norm" in name]
    assert len(norms) == 9
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float32
        assert name not in norms or torch.equal(tensor, torch.ones(48))


def test_files_and_index(fused: Path, tiny: Path) -> None:
    files = {path.name for path in fused.iterdir()}
    shards = {f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)}
    assert files >= {*shards, INDEX, "config.json", "kurtail.json", FILE, "tokenizer.json", "generation_config.json"}
    assert [path.name for path in fused.parent.iterdir()] == ["fused"]
    index = json.loads((fused / INDEX).read_text())
    size = 0
    for shard in shards:
        with safe_open(fused / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert index["weight_map"][name] == shard
                size += file.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == size
    config = AutoConfig.from_pretrained(fused)
    assert (config.tie_word_embeddings, config.dtype) == (False, torch.float32)
    text = "The old king found a dragon."
    assert (
        AutoTokenizer.from_pretrained(fused)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    )


def test_card(fused: Path, tiny: Path, rotations: Rotations) -> None:
    card = json.loads((fused / "kurtail.json").read_text())
    checkpoint = Checkpoint(tiny)
    assert card["method"] == "quarot"
    assert card["scheme"] == FLOAT.to_dict()
    assert card["source"] == {"model": "tiny", "sha256": checkpoint.sha256}
    assert card["tokenizer_sha256"] == checkpoint.tokenizer_sha256()
    assert card["rotations"] == rotations.origin
    assert card["rotations_sha256"] == sha256_of(fused / FILE)
    assert card["sha256"] == {p.name: sha256_of(p) for p in fused.iterdir() if p.name != "kurtail.json"}
    assert 0 < card["gate"]["float64"] < 1e-8
    assert card["gate"]["float64"] < card["gate"]["float32"] < 1e-4
    assert card["cost"]["fuse"]["peak_bytes"] > 0
    assert card["versions"]["torch"] == torch.__version__


def test_an_existing_folder_is_refused_or_overwritten(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "old").write_text("mine")
    with pytest.raises(ArtefactError, match="fused exists"):
        fuse(Checkpoint(tiny), rotations, "test", folder)
    assert [path.name for path in folder.iterdir()] == ["old"]
    fuse(Checkpoint(tiny), rotations, "test", folder, overwrite=True)
    assert not (folder / "old").exists()
    assert change(tiny, folder) < 1e-4


def scaled(factors: HadamardFactors | None) -> HadamardFactors:
    assert factors is not None
    return HadamardFactors(factors.left * 1.001, factors.right, factors.construction)


def wrong(rotations: Rotations, part: str) -> Rotations:
    """One rotation that is none."""
    residual, value = rotations.residual, rotations.value
    assert residual is not None
    assert value is not None
    value = value.clone()
    value[2] *= 1 + 1e-6
    nan = residual.clone()
    nan[3, 5] = float("nan")
    changes: dict[str, dict[str, Tensor | HadamardFactors]] = {
        "R1": {"residual": residual * (1 + 1e-6)},
        "R1 nan": {"residual": nan},
        "R2": {"value": value},
        "R3": {"query_key": scaled(rotations.query_key)},
        "R4": {"attention_output": scaled(rotations.attention_output)},
        "R5": {"mlp_hidden": scaled(rotations.mlp_hidden)},
    }
    return replace(rotations, **changes[part])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("R1", r"rotating the residual stream \(R1\) in model.layers.0 changed"),
        ("R1 nan", r"rotating the residual stream \(R1\) in model.layers.0 changed the output by nan"),
        ("R2", r"rotating the values \(R2\) in model.layers.2 changed"),
        ("R3", r"rotating online \(R3, R4, R5\) in model.layers.0 changed"),
        ("R4", r"rotating online \(R3, R4, R5\) in model.layers.0 changed"),
        ("R5", r"rotating online \(R3, R4, R5\) in model.layers.0 changed"),
    ],
)
def test_a_matrix_that_is_no_rotation_leaves_nothing(
    tiny: Path, rotations: Rotations, tmp_path: Path, part: str, message: str
) -> None:
    with pytest.raises(GateError, match=message):
        fuse(Checkpoint(tiny), wrong(rotations, part), "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_fold_the_wrong_way_round_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder stands, too."""
    right = folding.rotate_output
    monkeypatch.setattr(folding, "rotate_output", lambda linear, rotation: right(linear, rotation.T))
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "old").write_text("kept")
    with pytest.raises(GateError, match=r"\(R1\) in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", overwrite=True)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["fused", "fused/old"]


def test_a_fold_that_forgets_a_norm_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = folding.fold_norm
    monkeypatch.setattr(folding, "fold_norm", lambda norm, readers: right(norm, list(readers)[:1]))
    with pytest.raises(GateError, match=r"folding the norms in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_head_rotated_the_wrong_way_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, weights = _Fuser._into_residual, []

    def only_the_embedding(self: _Fuser, x: Tensor) -> Tensor:
        if x.ndim == 2:
            weights.append(x)
        return x @ rotations.residual.T if len(weights) == 2 else right(self, x)  # type: ignore[union-attr]

    monkeypatch.setattr(_Fuser, "_into_residual", only_the_embedding)
    with pytest.raises(GateError, match=r"the fused model changed"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskFull, match="fused needs"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


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
    windows = cut_windows(Checkpoint(tiny).tokenizer(), scaling(text).text, "calibration", seed=0).tokens
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
    windows = cut_windows(plain.tokenizer(), spec.text, "calibration", seed=0).tokens
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
    windows = cut_windows(fused.tokenizer(), scaling(text).text, "calibration", seed=0).tokens
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


def test_an_unknown_family_is_refused(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    config = (copy / "config.json").read_text().replace('"llama"', '"bert"')
    (copy / "config.json").write_text(config)
    with pytest.raises(UnsupportedArchitecture, match="bert"):
        fuse(Checkpoint(copy), rotations, "test", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
