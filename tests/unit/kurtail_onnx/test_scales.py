"""Exports of models with scaled channels and chosen signs: the norms' weights are in the graph, and R4's and R5's."""

import json
from pathlib import Path

import onnx
import torch
from exports import has_torchs_logits
from kurtail_onnx.exporter import ONNX

import kurtail_pl
from kurtail_pl.methods import RTN
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations


def test_scaled_channels_and_chosen_signs(tiny: Path, text_file: Path, cache: Path, tmp_path: Path) -> None:
    text = TextSpec(str(text_file), windows=4, seqlen=48)
    parts = ScaleSpec(["values", "mlp_hidden", "keys", "attention_input", "mlp_input"], text)
    signs = SignSpec(candidates=5, text=text, seed=3)
    rotations = random_rotations(Checkpoint(tiny).config, 0)
    fused = fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", scales=parts, signs=signs)
    artefact = quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path / "artefact")
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    model = kurtail_pl.load(artefact)
    assert has_torchs_logits(model, folder)
    stored = {tensor.name: tensor for tensor in onnx.load(folder / "model.onnx").graph.initializer}
    for name, norm in model.named_modules():
        if name.endswith("layernorm"):
            assert norm.weight.std() > 0.01
            found = torch.tensor(onnx.numpy_helper.to_array(stored[f"{name}.weight"]))
            assert torch.equal(found, norm.weight.float())
    described = json.loads((folder / "kurtail_export.json").read_text())["rotations"]["origin"]
    assert set(described["signs"]["chosen"]) == {"attention_output", "mlp_hidden"}
    assert any(described["signs"]["chosen"].values())
