"""Codes of quantized folders against a brute-force search of the grids, and against the error of normal weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import tensors_of
from torch import Tensor

import kurtail_pl
from kurtail_pl.maths.normal_grid import normal_error, normal_levels
from kurtail_pl.methods import GPTQ, RTN, Normal, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

WEIGHTS_ONLY = Scheme(activations=None, cache=None)
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def codes_of(packed: Tensor) -> np.ndarray:
    """Signed codes of packed bytes: low nibbles are the first half."""
    data = packed.numpy().astype(np.int16)
    codes = np.concatenate([data % 16, data // 16], -1)
    return np.where(codes > 7, codes - 16, codes)


def unsigned_codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """The same of 2, 3, 4 and 8 bits that count from 0; of 3 bits the low two stand before the high ones."""

    def spread(data: np.ndarray, width: int) -> np.ndarray:
        return np.concatenate([data >> k & 2**width - 1 for k in range(0, 8, width)], -1)

    if bits == 3:
        low, high = np.split(packed, [packed.shape[-1] * 2 // 3], -1)
        return spread(low, 2) + 4 * spread(high, 1)
    return spread(packed, bits)


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
        columns, data = weights[f"{full}.weight"].shape[1], packed[f"{full}.codes"].numpy()
        kept = 4 if bits == 3 and columns % 8 else bits  # Eight codes of 3 bits fill bytes.
        assert data.shape[1] == columns * kept // 8
        codes = unsigned_codes_of(data, kept)
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
