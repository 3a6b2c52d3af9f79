"""A store of the tiny model, which the stages' tests share and do not change, and what GPTQ is given."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from kurtail_pl.methods.rounders import gptq as rounder_module
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore


@pytest.fixture(scope="session")
def store(tiny: Path, text: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """50 rows of every site of the tiny model."""
    made = capture(CaptureSpec(str(tiny), text, rows=50, seed=3), tmp_path_factory.mktemp("store") / "store")
    assert made is not None
    return made


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
