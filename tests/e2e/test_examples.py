"""The worked examples of docs/examples.md, as they stand there."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CwmConfig, CwmForCausalLM

from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.methods import RTN
from kurtail_pl.stages import export as stage
from kurtail_pl.stages.fusion import passes
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.families import LLAMA, REGISTRY
from kurtail_pl.surgery.rotations import Rotations, random_rotations

PAGE = Path(__file__).resolve().parents[2] / "docs" / "examples.md"
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of the page, for this test alone."""

    def load(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(FILES[f"{name}.py"])
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def fused(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without rotations, so that the weights are those of the float model."""
    return fuse(Checkpoint(tiny), Rotations(), "none", tmp_path_factory.mktemp("fused") / "fused")


def test_each_is_at_most_forty_lines() -> None:
    assert set(FILES) == {"dithered.py", "shifts.py", "sort_hidden.py", "cwm.py", "dense.py"}
    assert {name: lines for name, text in FILES.items() if (lines := len(text.splitlines())) > 40} == {}
    assert [line for text in FILES.values() for line in text.splitlines() if len(line) > 120] == []


def weights_of(folder: Path, options: str, start: Callable[..., subprocess.Popen[str]]) -> dict[str, torch.Tensor]:
    """Tensors of what the page's command makes; in a process of its own, or a method would be known to other tests."""
    (command,) = re.findall(rf"^kurtail (quantize .*{re.escape(options)}.*)$", PAGE.read_text(), re.M)
    process = start(folder, *command.split())
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    out = folder / command.split()[command.split().index("--out") + 1]
    return {name: tensor for file in out.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1).int()


def test_a_rounder(fused: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    (tmp_path / "fused").symlink_to(fused)
    (tmp_path / "dithered.py").write_text(FILES["dithered.py"])
    made = weights_of(tmp_path, "dithered.Dithered", start)
    model = AutoModelForCausalLM.from_pretrained(fused)
    errors = []
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            codes = codes_of(made[f"model.layers.{name}.codes"])
            codes = torch.where(codes > 7, codes - 16, codes)
            steps = linear.weight / made[f"model.layers.{name}.scale"]
            inside = steps.abs() < 7  # Beyond there is no level on one side.
            errors.append((codes - steps)[inside])
    error = torch.cat(errors)
    assert error.abs().max() < 1 + 1e-4
    # Of one number p (1 - p) at most 1/4: six standard errors of the mean.
    assert error.mean().abs() < 6 * 0.5 / len(error) ** 0.5
    assert (error.abs() > 0.5).float().mean() > 0.1  # To nearest there would be none.
    card = json.loads((tmp_path / "dithered" / "kurtail.json").read_text())
    assert card["quantize"]["rounder"] == {"kind": "Dithered", "settings": {"seed": 0}}


def test_a_rounder_refuses_other_levels(
    fused: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "dithered.py").write_text(FILES["dithered.py"])
    process = start(
        tmp_path, "quantize", "--artefact", fused, "--out", "no", "--spec.rounder", "dithered.Dithered",
        "--spec.scheme.weights", "MXFP4",
    )  # fmt: skip
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Dithered needs even steps, not MXFP4" in messages


def test_a_format(fused: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    (tmp_path / "fused").symlink_to(fused)
    (tmp_path / "shifts.py").write_text(FILES["shifts.py"])
    made = weights_of(tmp_path, "shifts.Shifts", start)
    model = AutoModelForCausalLM.from_pretrained(fused)
    powers = [2.0**-i for i in range(8)]
    levels = torch.tensor(sorted([-p for p in powers[:7]] + [0.0] + powers))
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            scale, codes = made[f"model.layers.{name}.scale"], codes_of(made[f"model.layers.{name}.codes"])
            assert torch.equal(scale[:, 0], linear.weight.abs().amax(1))
            lost = (levels[codes] * scale - linear.weight).abs()
            least = (levels * scale.unsqueeze(-1) - linear.weight.unsqueeze(-1)).abs().amin(-1)
            torch.testing.assert_close(lost, least, rtol=0, atol=1e-6)


def test_a_transform(
    tiny: Path, tmp_path: Path, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes the same, and its channels are in another order."""
    SortHidden = example("sort_hidden").SortHidden  # noqa: N806 - a class
    listed = passes.transforms_of

    def with_sorting(walker: Walker, *arguments: Any) -> tuple[passes.Transform, ...]:
        *before, online = listed(walker, *arguments)
        return *before, SortHidden(walker.architecture), online

    monkeypatch.setattr(passes, "transforms_of", with_sorting)
    folder = fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "sorted")
    original, sorted_ = (AutoModelForCausalLM.from_pretrained(each).double() for each in (tiny, folder))
    tokens = torch.arange(40).unsqueeze(0)
    torch.testing.assert_close(sorted_(tokens).logits, original(tokens).logits, rtol=0, atol=1e-8)
    before, after = (model.model.layers[0].mlp.down_proj.weight.norm(dim=0) for model in (original, sorted_))
    assert torch.equal(after, after.sort(descending=True).values)
    assert not torch.equal(before, after)


def test_a_family(
    tiny: Path, tmp_path: Path, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "cwm", LLAMA)  # Taken away again after the test.
    example("cwm")
    torch.manual_seed(0)
    config = CwmConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=24,
    )  # fmt: skip
    model = CwmForCausalLM(config).double()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.float().save_pretrained(tmp_path / "cwm")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "cwm")
    checkpoint = Checkpoint(tmp_path / "cwm")
    rotated = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "rotated")
    tokens = torch.arange(40).unsqueeze(0)
    expected = CwmForCausalLM.from_pretrained(tmp_path / "cwm")(tokens).logits
    found = whole_model(Checkpoint(rotated))(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_an_exporter(fused: Path, tiny: Path, tmp_path: Path, example: Callable[[str], ModuleType]) -> None:
    Dense = example("dense").Dense  # noqa: N806 - a class
    artefact = quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path / "artefact")
    stage.export(artefact, tmp_path / "out", Dense())
    stored = {name: tensor for file in artefact.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with np.load(tmp_path / "out" / "weights.npz") as written:
        assert len(written.files) == 4 * 7
        for name in written.files:
            codes = codes_of(stored[f"{name}.codes"])
            expected = torch.where(codes > 7, codes - 16, codes) * stored[f"{name}.scale"]
            assert np.array_equal(written[name], expected.numpy())
    assert json.loads((tmp_path / "out" / "checks.json").read_text()) == {"matrices": "equal"}
    turned = fuse(Checkpoint(tiny), random_rotations(Checkpoint(tiny).config, 0), "quarot", tmp_path / "turned")
    turned = quantize(turned, QuantizeSpec(rounder=RTN()), tmp_path / "turned-4bit")
    with pytest.raises(ValueError, match="rotations act at run time"):
        stage.export(turned, tmp_path / "no", Dense())
