"""Quantized folders against a brute-force search of the grids, GPTQ against RTN, sizes on disk, the card."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shards import tensors_of
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import kurtail_pl
from kurtail_pl.errors import ArtefactError, CheckpointError, ConfigError, ResumeMismatch, TextError
from kurtail_pl.maths.normal_grid import normal_error, normal_levels
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import GPTQ, RTN, Format, LearnedClips, Matching, Normal, Rounder, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import UNROTATED, fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.card import CARD
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.rotations import Rotations, random_rotations

WEIGHTS_ONLY = Scheme(activations=None, keys=None, values=None)
LEARNING = LearnedClips(["activations", "keys", "values", "weights"], steps=2, windows=3, seqlen=48)
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def codes_of(packed: Tensor) -> np.ndarray:
    """Signed codes of packed bytes: low nibbles are the first half."""
    data = packed.numpy().astype(np.int16)
    codes = np.concatenate([data % 16, data // 16], -1)
    return np.where(codes > 7, codes - 16, codes)


def best_row(row: np.ndarray, bits: int) -> tuple[float, float]:
    """Least error of norm 2.4 over the 80 ratios, and its scale, each weight on the nearest of all values."""
    grid = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    found = []
    for step in range(80):
        scale = np.abs(row).max() * (1 - step / 100) / (2 ** (bits - 1) - 1)
        nearest = np.abs(row[:, None] - grid * scale).min(-1)
        found.append(((nearest**2.4).sum(), scale))
    return min(found)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_rtn_is_the_best_of_all_grids(fused: Path, tmp_path: Path, name: str) -> None:
    folder = quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path / "rtn")
    weights, packed = tensors_of(fused), tensors_of(folder)
    for layer in (0, 3):
        full = f"model.layers.{layer}.{name}"
        weight = weights[f"{full}.weight"].double().numpy()
        codes, scale = codes_of(packed[f"{full}.codes"]), packed[f"{full}.scale"].double().numpy()
        assert packed[f"{full}.scale"].dtype == torch.float32
        assert f"{full}.weight" not in packed
        assert np.abs(weight - codes * scale).max() < np.abs(weight).max()
        for row, row_codes, row_scale in zip(weight, codes, scale[:, 0], strict=True):
            error, _ = best_row(row, 4)
            assert (np.abs(row - row_codes * row_scale) ** 2.4).sum() == pytest.approx(error, rel=1e-3)
        torch.testing.assert_close(packed[f"{full}.bias"], weights[f"{full}.bias"].half(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_higgs_takes_the_nearest_level_of_each_group(fused: Path, tmp_path: Path, name: str) -> None:
    """Layer by layer in bits of its own, groups of four, against all levels in float64."""
    scheme = replace(WEIGHTS_ONLY, weights=Normal(group_size=4), layer_bits=[4, 2, 8, 3])
    folder = quantize(fused, QuantizeSpec(scheme, RTN()), tmp_path / "higgs")
    weights, packed = tensors_of(fused), tensors_of(folder)
    for layer, bits in enumerate(scheme.layer_bits or []):
        full = f"model.layers.{layer}.{name}"
        groups = weights[f"{full}.weight"].double().numpy().reshape(-1, 4)
        scale = np.linalg.norm(groups, axis=-1, keepdims=True) / 2
        nearest = np.abs((groups / scale)[..., None] - normal_levels(bits).numpy()).argmin(-1)
        data = packed[f"{full}.codes"].numpy()
        codes = data if bits > 4 else np.concatenate([data % 16, data // 16], -1)
        assert (codes.reshape(-1, 4) != nearest).mean() < 1e-3  # float32 on an edge
        np.testing.assert_allclose(packed[f"{full}.scale"].numpy().reshape(-1, 1), scale, rtol=1e-6)
        assert packed[f"{full}.scale"].dtype == torch.float32
        values = kurtail_pl.load(folder).get_submodule(full).dense_weight().double().numpy()
        np.testing.assert_allclose(values.reshape(-1, 4), normal_levels(bits).numpy()[nearest] * scale, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_higgs_loses_what_a_normal_weight_would_on_rotated_stories(stories: Path, tmp_path: Path, bits: int) -> None:
    """The fused rotations stand in for the Hadamards of HIGGS's groups: the weights' error is the normal grid's."""
    checkpoint = Checkpoint(stories)
    turned = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    scheme = replace(WEIGHTS_ONLY, weights=Normal(bits))
    model, before = (
        kurtail_pl.load(quantize(turned, QuantizeSpec(scheme, RTN()), tmp_path / "out")),
        tensors_of(turned),
    )
    errors = [
        ((module.dense_weight() - before[f"{name}.weight"]).square().sum() / before[f"{name}.weight"].square().sum())
        for name, module in model.named_modules()
        if f"{name}.codes" in tensors_of(tmp_path / "out")
    ]
    assert len(errors) == 5 * 7
    assert torch.stack(errors).mean().item() == pytest.approx(normal_error(bits), rel=0.05)


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
    assert card["quantize"]["text"] == {"source": text.source, "windows": 6, "seqlen": 48}
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


def test_a_hessian_of_too_few_tokens_falls_back_to_rtn(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    few = replace(text, windows=1, seqlen=8)
    spec = QuantizeSpec(WEIGHTS_ONLY, rounder=GPTQ(percdamp=1e-300), text=few)
    folder = quantize(fused, spec, tmp_path / "few")
    rtn = tensors_of(quantize(fused, replace(spec, rounder=RTN()), tmp_path / "rtn"))
    fallbacks = json.loads((folder / "kurtail.json").read_text())["fallbacks"]
    assert {f"model.layers.{i}.{name}" for i in range(4) for name in LINEARS} >= set(fallbacks)
    assert len(fallbacks) > 7
    for name in fallbacks:
        assert torch.equal(tensors_of(folder)[f"{name}.codes"], rtn[f"{name}.codes"])


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


def test_groups_and_eight_bits(fused: Path, tmp_path: Path) -> None:
    scheme = replace(WEIGHTS_ONLY, weights=Uniform(8, symmetric=False, group_size=4))
    folder = quantize(fused, QuantizeSpec(scheme, RTN()), tmp_path / "w8")
    name = "model.layers.1.mlp.down_proj"
    tensors, weight = tensors_of(folder), tensors_of(fused)[f"{name}.weight"]
    assert tensors[f"{name}.codes"].shape == (48, 172)
    assert tensors[f"{name}.scale"].shape == tensors[f"{name}.zero_point"].shape == (48, 43)
    zero, scale = (tensors[f"{name}.{part}"].repeat_interleave(4, 1).float() for part in ("zero_point", "scale"))
    values = (tensors[f"{name}.codes"].float() - zero) * scale
    assert (values - weight).abs().max() <= 0.51 * scale.max()
    assert torch.equal(kurtail_pl.load(folder).get_submodule(name).dense_weight(), values)


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
    with pytest.raises(ArtefactError, match="tiny is no folder of ours"):
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
    "settings",
    [
        {},
        {"rounder": GPTQ(correction="gptaq")},
        {"scheme": Scheme(centre=True, activation_scales="static", prefix=[7])},
        {"scheme": Scheme(prefix=[7]), "rounder": GPTQ(correction="gptaq")},
        {"quantized_activations": True, "clips": LEARNING},
    ],
    ids=["gptq", "gptaq", "static", "gptaq, prefix", "learned clips"],
)
def test_an_interrupted_run_leaves_the_old_folder_and_goes_on(
    settings: Any, fused: Path, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C while layer 2 is being quantized; the second run starts there and ends in the same bytes."""
    names: list[str] = []
    real: Callable[..., None] = LayerSolver.solve_layer
    broken = True

    def interrupted(self: LayerSolver, layer: nn.Module, prefix: str, *rest: object) -> None:
        names.append(prefix)
        real(self, layer, prefix, *rest)
        if broken and prefix.endswith("2"):
            raise KeyboardInterrupt

    spec = QuantizeSpec(**settings, text=text)
    undisturbed = quantize(fused, spec, tmp_path / "undisturbed")
    monkeypatch.setattr(LayerSolver, "solve_layer", interrupted)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        quantize(fused, spec, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    with pytest.raises(ArtefactError, match="exists"):
        quantize(fused, spec, tmp_path / "out")
    broken = False
    quantize(fused, spec, tmp_path / "out", overwrite=True)
    assert names == [f"model.layers.{i}" for i in (0, 1, 2, 2, 3)]
    made, expected = (json.loads((f / "kurtail.json").read_text()) for f in (tmp_path / "out", undisturbed))
    assert made.pop("cost")["quantize"]["seconds"] > 0
    expected.pop("cost")
    assert made == expected  # with the hashes of every file
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


@pytest.mark.parametrize("change", ["percdamp", "windows", "content", "dtype", "fused model"])
def test_unfinished_work_with_other_settings_is_refused(
    tiny: Path, fused: Path, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(Path(text.source).read_text())
    text, compute = replace(text, source=str(own)), AUTO

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    spec, source = QuantizeSpec(text=text), fused
    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "solve_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(fused, spec, tmp_path / "out")
    if change == "percdamp":
        spec, difference = replace(spec, rounder=GPTQ(percdamp=0.02)), "percdamp is 0.01, wanted 0.02"
    elif change == "windows":
        spec, difference = replace(spec, text=replace(text, windows=5)), "quantize.text.windows is 6, wanted 5"
    elif change == "content":
        difference = "another calibration text"
        own.write_text(own.read_text().swapcase())
    elif change == "dtype":
        compute, difference = Compute(dtype="bfloat16"), "dtype is 'float32', wanted 'bfloat16'"
    else:
        source, difference = tmp_path / "other", "another fused"
        rotations = random_rotations(AutoConfig.from_pretrained(fused), 1)
        fuse(Checkpoint(tiny), rotations, "quarot", source)
    with pytest.raises(ResumeMismatch, match=difference):
        quantize(source, spec, tmp_path / "out", compute=compute)
    quantize(source, replace(spec, rounder=RTN()), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "kurtail.json").is_file()


def test_the_same_text_and_model_elsewhere_go_on(
    fused: Path, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    solve, calls = LayerSolver.solve_layer, 0

    def interrupted(self: LayerSolver, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        solve(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "solve_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(fused, QuantizeSpec(text=text), tmp_path / "out")
    copy = shutil.copytree(fused, tmp_path / "elsewhere")
    spelled = shutil.copy(text.source, tmp_path / "spelled.txt")
    caplog.set_level("INFO")
    quantize(copy, QuantizeSpec(text=replace(text, source=str(spelled))), tmp_path / "out")
    assert "going on after 2 finished parts" in caplog.text


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(weights=Uniform(group_size=16)), "weights.group_size is 16 and this model has 172"),
        (Scheme(activations=Quantizer(group_size=5)), "activations.group_size is 5 and this model has 48"),
        (Scheme(keys=Quantizer(group_size=12)), "keys.group_size is 12 and this model has 16"),
    ],
)
def test_groups_that_fill_no_width_are_refused_at_once(
    scheme: Scheme, message: str, fused: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(fused, QuantizeSpec(scheme), tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []
