"""One fused model and one artefact of the tiny model, which tests share and do not change."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations


@pytest.fixture(scope="session")
def text(text_file: Path) -> TextSpec:
    """Evaluation and calibration text: 6 windows of 48 tokens."""
    return TextSpec(str(text_file), windows=6, seqlen=48)


@pytest.fixture(scope="session")
def rotations(tiny: Path) -> Rotations:
    """All five, random, as if they had been learned at some cost."""
    cost = {"seconds": 3.0, "cpu_seconds": 5.0, "peak_bytes": 7, "device_peak_bytes": 0}
    return replace(random_rotations(AutoConfig.from_pretrained(tiny), 0), origin={"seed": 0, "cost": cost})


@pytest.fixture(scope="session")
def fused(tiny: Path, rotations: Rotations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rotated, float32."""
    return fuse(Checkpoint(tiny), rotations, "quarot", tmp_path_factory.mktemp("fused") / "fused")


@pytest.fixture(scope="session")
def artefact(fused: Path, text: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused model in 4 bits everywhere, by GPTQ."""
    return quantize(fused, QuantizeSpec(text=text), tmp_path_factory.mktemp("artefacts") / "tiny-quarot-w4a4kv4")
