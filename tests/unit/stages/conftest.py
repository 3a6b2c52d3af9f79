"""One fused model, one artefact and one store of the tiny model, which the stages' tests share and do not change."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoConfig

from kurtail_pl.methods.rounders import gptq as rounder_module
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore
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


@pytest.fixture(scope="session")
def store(tiny: Path, text: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """50 rows of every site of the tiny model."""
    made = capture(CaptureSpec(str(tiny), text, rows=50, seed=3), tmp_path_factory.mktemp("store") / "store")
    assert made is not None
    return made


@pytest.fixture
def kurtail_env() -> dict[str, str]:
    """Environment of a process that runs this checkout's `kurtail`."""
    root = str(Path(__file__).resolve().parents[3])
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": root}


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every Hessian that GPTQ is given, in order."""
    seen: list[Tensor] = []
    real: Callable[..., object] = rounder_module.gptq

    def record(weight: Tensor, hessian: Tensor, *rest: object) -> object:
        seen.append(hessian.clone())
        return real(weight, hessian, *rest)

    monkeypatch.setattr(rounder_module, "gptq", record)
    return seen


@pytest.fixture
def crosses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every product of wanted and given inputs that GPTQ is given, in order."""
    seen: list[Tensor] = []
    real: Callable[..., object] = rounder_module.gptq

    def record(*arguments: object) -> object:
        assert isinstance(arguments[-1], Tensor)
        seen.append(arguments[-1].clone())
        return real(*arguments)

    monkeypatch.setattr(rounder_module, "gptq", record)
    return seen
