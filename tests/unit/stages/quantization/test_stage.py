"""Quantized folders: their cards, what stays float16, sizes on disk; what is refused, and that it leaves nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards import tensors_of
from transformers import LlamaConfig, LlamaForCausalLM

import kurtail_pl
from kurtail_pl.errors import ArtefactError, CheckpointError, ConfigError, TextError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import (
    GPTQ,
    RTN,
    Format,
    Int4PerTokenHead,
    Matching,
    Normal,
    PerTokenHead,
    Q4_0Cache,
    Rounder,
    Uniform,
)
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import UNROTATED, fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.card import CARD
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.surgery.rotations import Rotations

WEIGHTS_ONLY = Scheme(activations=None, cache=None)
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def test_a_higgs_card_says_format_and_rounder(fused: Path, tmp_path: Path) -> None:
    folder = quantize(fused, QuantizeSpec(Scheme(Normal(3)), RTN()), tmp_path / "out")
    card = json.loads((folder / "kurtail.json").read_text())
    assert card["scheme"]["weights"] == {"kind": "Normal", "settings": {"bits": 3, "group_size": None}}
    assert card["scheme"]["layer_bits"] is None
    assert card["quantize"]["rounder"] == {"kind": "RTN", "settings": {}}
    assert card["quantize"]["scheme"] == card["scheme"]
    assert card["rounding"] == "higgs-rtn"
    assert card["calibration_text_sha256"] is None


def test_rtn_with_float_weights_quantizes_the_rest(fused: Path, tmp_path: Path) -> None:
    folder = quantize(fused, QuantizeSpec(Scheme(weights=None), RTN()), tmp_path / "out")
    assert json.loads((folder / "kurtail.json").read_text())["scheme"] == Scheme(weights=None).to_dict()
    assert torch.equal(
        tensors_of(folder)["model.layers.0.mlp.up_proj.weight"],
        tensors_of(fused)["model.layers.0.mlp.up_proj.weight"].half(),
    )


def test_bits_for_another_number_of_layers_are_refused(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_bits are 3 numbers and this model has 4 layers"):
        quantize(fused, QuantizeSpec(Scheme(Normal(), layer_bits=[4, 4, 4]), RTN()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_card_holds_all_that_repeats_it(fused: Path, artefact: Path, text: TextSpec) -> None:
    card = json.loads((artefact / "kurtail.json").read_text())
    before = json.loads((fused / "kurtail.json").read_text())
    for key in ("source", "tokenizer_sha256", "rotations", "rotations_sha256", "gate"):
        assert card[key] == before[key]
    assert card["method"] == "quarot"
    assert card["scheme"] == Scheme().to_dict()
    assert Scheme.from_dict(card["quantize"]["scheme"]) == Scheme()
    assert card["rounding"] == "gptq"
    settings = {"block_size": 128, "percdamp": 0.01, "act_order": True, "correction": None, "refine": 0}
    assert card["quantize"]["rounder"] == {"kind": "GPTQ", "settings": settings}
    assert card["quantize"]["matching"] is None
    assert card["quantize"]["text"] == {"source": text.source, "windows": 6, "seqlen": 48, "bos": False}
    assert card["calibration_text_sha256"] == sha256_of(Path(text.source))
    assert card["fallbacks"] == []
    assert set(card["cost"]) == {"fuse", "quantize"}
    assert card["sha256"] == {p.name: sha256_of(p) for p in artefact.iterdir() if p.name != "kurtail.json"}


def test_the_rotations_hash_is_that_of_the_artefacts_own_file(artefact: Path) -> None:
    card = json.loads((artefact / "kurtail.json").read_text())
    assert card["rotations_sha256"] == sha256_of(artefact / "rotations.safetensors")


@pytest.mark.parametrize(
    ("weights", "rounder", "method"),
    [
        (Uniform(), RTN(), "rtn"),
        (Uniform(), GPTQ(), "gptq"),
        (Normal(), RTN(), "higgs-rtn"),
        (Normal(), GPTQ(), "higgs-gptq"),
    ],
)
def test_without_rotations_the_method_is_the_rounding(
    tiny: Path, tmp_path: Path, text: TextSpec, weights: Format, rounder: Rounder, method: str
) -> None:
    plain = fuse(Checkpoint(tiny), Rotations(), UNROTATED, tmp_path / "plain")
    spec = QuantizeSpec(Scheme(weights), rounder, text=text)
    card = json.loads((quantize(plain, spec, tmp_path / "out") / "kurtail.json").read_text())
    assert card["method"] == method
    assert (card["calibration_text_sha256"] is None) == (rounder == RTN())


def test_what_is_not_a_layers_linear_is_float16(fused: Path, artefact: Path) -> None:
    before, after = tensors_of(fused), tensors_of(artefact)
    quantized = {f"model.layers.{i}.{name}.weight" for i in range(4) for name in LINEARS}
    assert set(after) == (set(before) - quantized) | {
        name.replace("weight", part) for name in quantized for part in ("codes", "scale")
    }
    for name in set(before) - quantized:
        assert torch.equal(after[name], before[name].half()), name


def test_16_bit_weights_are_the_fused_ones(fused: Path, tmp_path: Path, text: TextSpec) -> None:
    spec = QuantizeSpec(replace(Scheme(), weights=None), text=text)
    folder = quantize(fused, spec, tmp_path / "w16")
    before, after = tensors_of(fused), tensors_of(folder)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.half()), name
    card = json.loads((folder / "kurtail.json").read_text())
    assert card["scheme"]["weights"] is None
    assert card["scheme"]["activations"]["bits"] == 4
    linear = kurtail_pl.load(folder).model.layers[0].mlp.down_proj
    assert linear.activations == Scheme().activations


def test_four_bit_linears_take_about_a_quarter_of_bfloat16(tiny: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    wide = fuse(Checkpoint(tmp_path / "model"), Rotations(), "rtn", tmp_path / "wide")
    folder = quantize(wide, QuantizeSpec(rounder=RTN()), tmp_path / "rtn")
    parameters = 4 * 256 * 256 + 3 * 256 * 512
    stored = sum(t.nbytes for n, t in tensors_of(folder).items() if n.endswith(("codes", "scale", "zero_point")))
    assert stored == parameters // 2 + 4 * (5 * 256 + 256 + 2 * 512 - 256)
    assert stored <= 0.27 * 2 * parameters
    others = 2 * 2 * (2 * 300 * 256 + 3 * 256) // 2
    assert 0 < (folder / "model.safetensors").stat().st_size - stored - others < 4096


def test_gptq_refines_evenly_spaced_levels_alone(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounder.refine is 2 and the levels of Normal .*; write refine: 0"):
        QuantizeSpec(Scheme(Normal()), GPTQ(refine=2))
    QuantizeSpec(Scheme(weights=None), GPTQ(refine=2))
    folder = quantize(
        fused, QuantizeSpec(replace(WEIGHTS_ONLY, weights=Normal(3)), GPTQ(), text=text), tmp_path / "out"
    )
    assert json.loads((folder / "kurtail.json").read_text())["fallbacks"] == []
    kurtail_pl.load(folder)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_the_damping_of_matching_is_positive(damping: float) -> None:
    with pytest.raises(ConfigError, match=r"matching.damping is .*; give a positive number"):
        Matching(damping)


def test_a_plain_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="tiny is no finished folder of kurtail's"):
        quantize(tiny, QuantizeSpec(rounder=RTN()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_short_a_text_leaves_nothing(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="were asked for"):
        quantize(fused, QuantizeSpec(text=replace(text, windows=10_000)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(fused: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("mine")
    with pytest.raises(ArtefactError, match="exists"):
        quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("damage", ["tensor gone", "wrong shape"])
def test_weights_that_fail_half_way_leave_nothing(fused: Path, tmp_path: Path, damage: str) -> None:
    """Layers 0 and 1 have been written when layer 2 cannot be read; the card was written for what is there."""
    copy = shutil.copytree(fused, tmp_path / "fused")
    shard = copy / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.2.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if damage == "wrong shape":
        tensors[name] = weight[:-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    card = json.loads((copy / CARD).read_text())
    card["sha256"][shard.name] = sha256_of(shard)
    (copy / CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"model.layers.2.*up_proj"):
        quantize(copy, QuantizeSpec(rounder=RTN()), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(weights=Uniform(group_size=16)), "weights.group_size is 16 and this model has 172"),
        (Scheme(activations=Quantizer(group_size=5)), "activations.group_size is 5 and this model has 48"),
        (Scheme(cache=PerTokenHead(Quantizer(group_size=12))), "keys.group_size is 12 and this model has 16"),
        (Scheme(cache=Q4_0Cache()), "q4_0, whose blocks of 32 channels do not divide this model's heads of 16"),
        (Scheme(cache=Int4PerTokenHead()), "channels from 32 on, and this model's have 16; use"),
    ],
)
def test_groups_that_fill_no_width_are_refused_at_once(
    scheme: Scheme, message: str, fused: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(fused, QuantizeSpec(scheme), tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []
