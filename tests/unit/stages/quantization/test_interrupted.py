"""Quantization that was interrupted: it goes on to the same bytes, and with no other settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from kurtail_pl.errors import ArtefactError, ResumeMismatch
from kurtail_pl.methods import GPTQ, RTN, BlockTransforms, LearnedClips, NUQCache
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.rotations import random_rotations

LEARNING = LearnedClips(["activations", "keys", "values", "weights"], steps=2, windows=3, seqlen=48)
TRAINING = BlockTransforms(epochs=2, windows=3, seqlen=48)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rounder": GPTQ(correction="gptaq")},
        {"scheme": Scheme(centre=True, activation_scales="static", prefix=[7])},
        {"scheme": Scheme(prefix=[7]), "rounder": GPTQ(correction="gptaq")},
        {"quantized_activations": True, "clips": LEARNING},
        {"quantized_activations": True, "transforms": TRAINING},
        {"scheme": Scheme(weights=None, activations=None, cache=NUQCache())},
    ],
    ids=["gptq", "gptaq", "static", "gptaq, prefix", "learned clips", "transforms", "cache before rope"],
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
