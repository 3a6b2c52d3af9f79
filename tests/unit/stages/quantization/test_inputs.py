"""What is made from the inputs of linears, against transformers' own: Hessians, centres, grids, matched weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import tensors_of
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods import GPTQ, RTN, Matching, PerTokenHead, Rounder, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import empty_model, equip_model
from kurtail_pl.surgery.rotations import Rotations

WEIGHTS_ONLY = Scheme(activations=None, cache=None)
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def calibration(folder: Path, text: TextSpec) -> Tensor:
    return cut_windows(Checkpoint(folder), text, "calibration", seed=0).tokens


@torch.no_grad()
def inputs_of(folder: Path, windows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What each linear's weight multiplies, ``[tokens, in]`` float64: hooked inputs times the dense online rotation."""
    model = kurtail_pl.load(folder)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0][0].double()))
    for window in windows:
        model(window.unsqueeze(0))
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    for name in names:
        rotation = model.get_submodule(name).rotation
        if rotation is not None:
            found[name] = found[name] @ torch.kron(rotation.left, rotation.right)
    return found


@pytest.fixture(scope="module")
def by_method(fused: Path, text: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights alone in 4 bits, by both methods."""
    root = tmp_path_factory.mktemp("methods")
    text = replace(text, windows=12)
    rounders: dict[str, Rounder] = {"rtn": RTN(), "gptq": GPTQ()}
    specs = {name: QuantizeSpec(WEIGHTS_ONLY, rounder, text=text) for name, rounder in rounders.items()}
    return {method: quantize(fused, spec, root / method) for method, spec in specs.items()}


def test_gptq_has_less_error_on_the_calibration_text(fused: Path, by_method: dict[str, Path], text: TextSpec) -> None:
    windows = calibration(fused, replace(text, windows=12))
    names = [f"model.layers.0.{name}" for name in LINEARS]
    inputs = inputs_of(fused, windows, names)
    models = {m: kurtail_pl.load(folder) for m, folder in {**by_method, "float": fused}.items()}
    dense = {m: {n: model.get_submodule(n).dense_weight().double() for n in names} for m, model in models.items()}
    for name in names:
        errors = {m: ((dense[m][name] - dense["float"][name]) @ inputs[name].T).norm().item() for m in by_method}
        assert errors["gptq"] < 0.9 * errors["rtn"], name
    with torch.no_grad():
        logits = {m: model(windows).logits for m, model in models.items()}
    errors = {m: (logits[m] - logits["float"]).norm().item() for m in by_method}
    assert errors["gptq"] < errors["rtn"]


def test_hessians_see_the_rotated_inputs_of_the_quantized_layers(
    fused: Path, text: TextSpec, tmp_path: Path, hessians: list[Tensor]
) -> None:
    """Recorded as GPTQ gets them; compared with inputs hooked in the finished artefact, biases and norms in float16."""
    folder = quantize(fused, QuantizeSpec(WEIGHTS_ONLY, text=text), tmp_path / "gptq")
    assert len(hessians) == 4 * 7
    names = [f"model.layers.{i}.{name}" for i in (0, 2) for name in LINEARS]
    inputs = inputs_of(folder, calibration(fused, text), names)
    for index, name in enumerate(names):
        expected = inputs[name].T @ inputs[name]
        hessian = hessians[index if index < 7 else index + 7]
        assert (hessian - expected).norm() < 1e-2 * expected.norm(), name


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "certain"), [(WEIGHTS_ONLY, 28), (Scheme(centre=True), 3)], ids=["weights", "all"])
def test_gptaq_wants_the_inputs_of_the_float_model(
    scheme: Scheme, certain: int, fused: Path, text: TextSpec, tmp_path: Path, crosses: list[Tensor]
) -> None:
    """Recorded as GPTQ gets them; compared with inputs hooked in the float model and in the finished artefact.

    The artefact's float16 decides ties of the activations otherwise, so only the first are the same there.
    """
    spec = QuantizeSpec(scheme, rounder=GPTQ(correction="gptaq"), text=text, quantized_activations=True)
    folder = quantize(fused, spec, tmp_path / "gptaq")
    assert len(crosses) == 4 * 7
    names = [f"model.layers.{i}.{name}" for i in range(4) for name in LINEARS][:certain]
    windows, model = calibration(fused, text), kurtail_pl.load(folder)
    wanted, given = inputs_of(fused, windows, names), inputs_of(folder, windows, names)
    for name, cross in zip(names, crosses, strict=False):
        linear = model.get_submodule(name)
        centre = 0 if linear.centre is None else linear.centre.double()
        y = given[name] - centre
        if linear.activations is not None:
            y = fake_quantize(y, linear.activations)
        expected = (wanted[name] - centre).T @ y
        assert (cross - expected).norm() < 5e-3 * expected.norm(), name
        if not name.startswith("model.layers.0.self_attn") or linear.activations is not None:
            assert (y.T @ y - expected).norm() > 1e-2 * expected.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("rounder", [RTN(), GPTQ()])
@pytest.mark.parametrize("quantized_activations", [True, False])
def test_states_after_a_layer_are_those_of_the_quantized_layer(
    fused: Path, rotations: Rotations, text: TextSpec, rounder: Rounder, quantized_activations: bool, tmp_path: Path
) -> None:
    checkpoint, scheme = Checkpoint(fused), Scheme()
    model = empty_model(checkpoint.config)
    equip_model(model, scheme if quantized_activations else WEIGHTS_ONLY, rotations)
    walker = Walker(checkpoint, model)
    solver = LayerSolver(walker, scheme, rounder)
    with resumable_folder(tmp_path / "work", False, {}) as work:
        hidden = walker.hidden_states(calibration(fused, text), work)
        for index, layer in walker.layers("test", work):
            before = [states.clone() for states in hidden.before]
            solver.solve_layer(layer, f"model.layers.{index}", hidden, scheme.weights)
            assert all(layer.get_submodule(name).weight is None for name in LINEARS)
            positions = model.model.rotary_emb(before[0], torch.arange(text.seqlen).unsqueeze(0))
            for states, after in zip(before, hidden.after, strict=True):
                expected = layer(states, position_embeddings=positions, attention_mask=None)
                torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, Uniform(8)])
def test_centres_are_the_means_of_what_each_linear_reads(
    fused: Path, text: TextSpec, weights: Uniform | None, tmp_path: Path
) -> None:
    scheme = replace(Scheme(), weights=weights, activations=Quantizer(8), centre=True)
    folder = quantize(fused, QuantizeSpec(scheme, RTN(), text=text), tmp_path / "centred")
    names = [f"model.layers.{i}.{name}" for i in range(4) for name in LINEARS]
    inputs, stored = inputs_of(fused, calibration(fused, text), names), tensors_of(folder)
    before = tensors_of(fused)
    for name in names:
        mean = inputs[name].mean(0)
        # The linears before it are rounded to 8 bits.
        assert (stored[f"{name}.centre"].double() - mean).norm() < 0.03 * mean.norm(), name
        offset = before[f"{name}.bias"].double() + before[f"{name}.weight"].double() @ stored[f"{name}.centre"].double()
        torch.testing.assert_close(stored[f"{name}.bias"].double(), offset, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("quantized_activations", [True, False])
def test_static_grids_are_the_best_for_what_each_linear_reads(
    fused: Path, text: TextSpec, symmetric: bool, quantized_activations: bool, tmp_path: Path
) -> None:
    """Against many scales, and all zero points, tried on the hooked inputs; those that share inputs share the grid."""
    quantizer = Quantizer(4, symmetric)
    scheme = Scheme(None, quantizer, None, activation_scales="static")
    spec = QuantizeSpec(scheme, text=text, quantized_activations=quantized_activations)
    folder = quantize(fused, spec, tmp_path / "static")
    names = [f"model.layers.{i}.{name}" for i in (0, 3) for name in LINEARS]
    inputs = inputs_of(folder if quantized_activations else fused, calibration(fused, text), names)
    stored, (low, high) = tensors_of(folder), quantizer.code_range
    for name in names:
        x, scale = inputs[name].double(), stored[f"{name}.input_scale"]
        assert scale.shape == (1,)
        assert scale.dtype == torch.float32
        zero = stored.get(f"{name}.input_zero_point", torch.zeros(1))
        assert (f"{name}.input_zero_point" in stored) != symmetric

        def error(scale: float, zero: int, x: Tensor = x) -> float:
            values = (torch.clamp(torch.round(x / scale) + zero, low, high) - zero) * scale
            return (values - x).square().mean().item()

        scales = torch.logspace(-1, 0.1, 30, dtype=torch.float64) * 2 * x.abs().max().item() / (high - low)
        zeros = [0] if symmetric else range(16)
        best = min(error(s, z) for s in scales.tolist() for z in zeros)
        assert error(scale.item(), int(zero)) < 1.03 * best, name
    for layer in (0, 3):
        for readers in (LINEARS[:3], LINEARS[4:6]):
            grids = [stored[f"model.layers.{layer}.{name}.input_scale"] for name in readers]
            assert all(torch.equal(grid, grids[0]) for grid in grids)


@torch.no_grad()
def test_key_centres_are_the_means_of_rotated_keys(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    spec = QuantizeSpec(replace(Scheme(), weights=None, cache=PerTokenHead(centre_keys=True)), text=text)
    stored, windows = tensors_of(quantize(fused, spec, tmp_path / "centred")), calibration(fused, text)
    names = [f"model.layers.{i}.self_attn.k_proj" for i in range(4)]
    inputs, model = inputs_of(fused, windows, names), kurtail_pl.load(fused)
    positions = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(windows.shape[1]).unsqueeze(0))
    for layer, name in enumerate(names):
        linear = model.get_submodule(name)
        keys = inputs[name] @ linear.weight.double().T + linear.bias.double()
        keys = keys.view(len(windows), windows.shape[1], 2, -1).transpose(1, 2)
        _, turned = apply_rotary_pos_emb(keys, keys, *positions)
        rotation = model.model.layers[layer].self_attn.query_key_rotation
        mean = (turned @ torch.kron(rotation.left, rotation.right).double()).mean((0, 2))
        found = stored[f"model.layers.{layer}.self_attn.key_centre"].double()
        torch.testing.assert_close(found[:, 0], mean, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_a_centred_artefact_is_the_model_when_nothing_is_rounded(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    scheme = replace(Scheme(), weights=None, centre=True, cache=PerTokenHead(centre_keys=True))
    model = kurtail_pl.load(quantize(fused, QuantizeSpec(scheme, text=text), tmp_path / "centred"))
    for name in LINEARS:
        for layer in model.model.layers:
            layer.get_submodule(name).activations = None
            layer.self_attn.cache = None
    windows = calibration(fused, text)
    expected = kurtail_pl.load(fused)(windows).logits
    assert (model(windows).logits - expected).norm() < 5e-3 * expected.norm()  # float16


@torch.no_grad()
def test_gptaq_brings_the_outputs_nearer(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """On the calibration text, and in the first layer: 3 bits err enough to see."""
    scheme = replace(Scheme(), activations=Quantizer(3), cache=None)
    text = replace(text, windows=12)
    windows = calibration(fused, text)
    expected, errors = outputs_of(fused, windows), {}
    corrections: Any = (None, "gptaq")
    for correction in corrections:
        spec = QuantizeSpec(scheme, rounder=GPTQ(correction=correction), text=text, quantized_activations=True)
        found = outputs_of(quantize(fused, spec, tmp_path / str(correction)), windows)
        errors[correction] = sum((found[name] - expected[name]).norm().item() for name in expected)
    assert errors["gptaq"] < 0.99 * errors[None]


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, Uniform(4)])
@pytest.mark.parametrize("centre", [False, True])
def test_matched_weights_bring_the_outputs_nearer(
    fused: Path, text: TextSpec, weights: Uniform | None, centre: bool, tmp_path: Path
) -> None:
    """On the calibration text, and in the first layer, whose inputs are the float model's: 3 bits err enough to see."""
    scheme = replace(Scheme(), weights=weights, activations=Quantizer(3), cache=None, centre=centre)
    text = replace(text, windows=12)
    windows = calibration(fused, text)
    expected = outputs_of(fused, windows)
    errors = {}
    for match in (False, True):
        spec = QuantizeSpec(scheme, text=text, quantized_activations=True, matching=Matching() if match else None)
        found = outputs_of(quantize(fused, spec, tmp_path / str(match)), windows)
        errors[match] = {name: (found[name] - expected[name]).norm().item() for name in expected}
    for name in errors[True]:
        assert errors[True][name] < errors[False][name], name


def outputs_of(folder: Path, windows: Tensor) -> dict[str, Tensor]:
    """What the attention readers of the first layer write, ``[tokens, out]``."""
    model, rows = kurtail_pl.load(folder), {f"{n}_proj": [] for n in "qkv"}
    for name, parts in rows.items():
        linear = model.get_submodule(f"model.layers.0.self_attn.{name}")
        linear.register_forward_hook(lambda _, args, out, parts=parts: parts.append(out[0].double()))
    for window in windows:
        model(window.unsqueeze(0))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_matching_without_quantized_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantized_activations: true"):
        QuantizeSpec(matching=Matching())
    with pytest.raises(ConfigError, match=r"scheme\.activations"):
        QuantizeSpec(WEIGHTS_ONLY, matching=Matching(), quantized_activations=True)


def test_matching_and_gptaq_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"matching is given and .* rounded by GPTQ with GPTAQ's correction"):
        QuantizeSpec(rounder=GPTQ(correction="gptaq"), quantized_activations=True, matching=Matching())
    QuantizeSpec(rounder=GPTQ(correction="foem"), quantized_activations=True, matching=Matching())
