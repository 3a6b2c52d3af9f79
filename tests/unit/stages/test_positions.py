"""Windows that are longer than the model's positions, in every stage: refused before any work, by both numbers."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import RTN, LearnedClips
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.planning.learning import Learning, ProxyLearning, WholeModelLearning
from kurtail_pl.stages.planning.plan import plan
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations

pytestmark = pytest.mark.usefixtures("cache")

POSITIONS = 256
"""Of the tiny model."""
LONG = LearnedClips(windows=1, seqlen=POSITIONS + 1)


def refused(seqlen: int = POSITIONS + 1, positions: int = POSITIONS) -> str:
    return rf"^seqlen is {seqlen} and the model has {positions} positions .*; ask for shorter windows$"


@pytest.mark.parametrize("seqlen", [POSITIONS, POSITIONS + 1])
@pytest.mark.parametrize("stage", ["evaluate", "capture", "scales", "signs", "quantize", "learned clips"])
def test_windows_up_to_the_last_position(
    stage: str, seqlen: int, tiny: Path, fused: Path, rotations: Rotations, text: TextSpec, tmp_path: Path
) -> None:
    long, out = TextSpec(text.source, windows=1, seqlen=seqlen), tmp_path / "out"
    learning = LearnedClips(parts=["activations"], steps=1, windows=1, seqlen=seqlen)
    learned = QuantizeSpec(rounder=RTN(), text=text, quantized_activations=True, clips=learning)
    plain = Checkpoint(tiny)
    stages: dict[str, Callable[[], object]] = {
        "evaluate": lambda: perplexity(plain, long),
        "capture": lambda: capture(CaptureSpec(str(tiny), long, rows=5), out),
        "scales": lambda: fuse(plain, rotations, "quarot", out, scales=ScaleSpec(text=long)),
        "signs": lambda: fuse(plain, rotations, "quarot", out, signs=SignSpec(2, text=long)),
        "quantize": lambda: quantize(fused, QuantizeSpec(text=long), out),
        "learned clips": lambda: quantize(fused, learned, out),
    }
    if seqlen == POSITIONS:
        stages[stage]()
        return
    with pytest.raises(ConfigError, match=refused()):
        stages[stage]()
    assert list(tmp_path.glob("**/*out*")) == []


TEXT = TextSpec(windows=1, seqlen=64)
TOO_LONG = replace(TEXT, seqlen=POSITIONS + 1)


SETTINGS = {
    "capture": "data.capture.text.seqlen",
    "learn": "data.text.seqlen",
    "evaluate": "evaluation.text.seqlen",
    "scales": "fusion.scales.text.seqlen",
    "signs": "fusion.signs.text.seqlen",
    "quantize": "quantization.text.seqlen",
    "clips": "quantization.clips.seqlen",
}
"""Settings of a recipe that say how long windows are, in the order of the message."""


@pytest.mark.parametrize("parts", [*([name] for name in SETTINGS), ["quantize", "evaluate"], []])
def test_a_plan_refuses_them_by_the_names_of_all_that_are_too_long(parts: list[str], tiny: Path) -> None:
    def of(name: str) -> TextSpec:
        return TOO_LONG if name in parts else TEXT

    quantized = QuantizeSpec(text=of("quantize"), quantized_activations=True)
    if "clips" in parts:
        quantized = replace(quantized, clips=LONG)
    learning: Learning = WholeModelLearning(1, 1, of("learn").seqlen) if "learn" in parts else ProxyLearning(1, 1)

    def planned() -> object:
        return plan(
            Checkpoint(tiny).config, CaptureSpec("x", of("capture"), 8), learning, quantized, of("evaluate"), 0,
            scales=ScaleSpec(text=of("scales")), signs=SignSpec(text=of("signs")),
        )  # fmt: skip

    if not parts:
        planned()
        return
    named = ", ".join(f"{setting} is {TOO_LONG.seqlen}" for name, setting in SETTINGS.items() if name in parts)
    with pytest.raises(ConfigError, match=refused().replace(f"seqlen is {TOO_LONG.seqlen}", re.escape(named))):
        planned()


def test_text_that_is_not_used_may_be_of_any_length(tiny: Path) -> None:
    """Plain rounding reads none."""
    spec = QuantizeSpec(rounder=RTN(), text=TOO_LONG)
    plan(Checkpoint(tiny).config, CaptureSpec("x", TEXT, 8), ProxyLearning(1, 1), spec, TEXT, 0)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_scaled_positions_are_those_that_the_configuration_says(
    kind: str, tiny: Path, text: TextSpec, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    for name in ("factor", "original_max_position_embeddings"):
        if kind == "default" or (kind in ("linear", "dynamic") and name != "factor"):
            rope.pop(name)
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope, "max_position_embeddings": 64}))
    spec = replace(text, windows=1, seqlen=64)
    assert cut_windows(Checkpoint(model), spec, "evaluation").tokens.shape == (1, 64)
    with pytest.raises(ConfigError, match=refused(65, 64)):
        cut_windows(Checkpoint(model), replace(spec, seqlen=65), "evaluation")


def test_a_probe_is_no_longer_than_the_positions(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    fuse(Checkpoint(model), rotations, "quarot", tmp_path / "out")
