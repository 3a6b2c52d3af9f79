"""What docs/figures.py draws, against numbers reckoned another way."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig

from kurtail_pl.methods import default_cache
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.surgery.rotations import Rotations, random_rotations

SCRIPT = Path(__file__).resolve().parents[4] / "docs" / "figures.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("concept_figures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_levels_and_loss_of_a_token(script: ModuleType, store: ActivationStore) -> None:
    rows = script.held_out(store, "layer002.attn_in", 1e-6).double()
    figure = script.levels(store, {"before": None}, 1e-6)
    token = rows[rows.abs().amax(1).argsort()[len(rows) // 2]]
    step = token.abs().max() * 0.9 / 7
    codes = (token / step).round().clamp(-8, 7)
    lost = ((codes * step - token) ** 2).sum() / (token**2).sum()
    (axes,) = figure.axes
    assert axes.get_title() == f"before: {len(set(codes.tolist()))} of 16 levels used, {lost:.1%} lost"


def test_memory_of_the_cache(script: ModuleType, tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    figure = script.cache_memory(str(tiny), default_cache())
    full, packed = (line.get_ydata()[-1] * 1e6 / 8192 for line in figure.axes[0].lines)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    assert full == pytest.approx(heads * 2 * 16)
    assert packed == pytest.approx(heads * (16 / 2 + 4 + 1))  # Codes, a float32 scale, a zero point of a byte.


def test_it_draws_all(
    script: ModuleType, store: ActivationStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual = random_rotations(AutoConfig.from_pretrained(tiny), 0).residual
    write_rotations(tmp_path / "rotations.safetensors", Rotations(residual=residual))
    options = {"store": store.folder, "rotations": tmp_path / "rotations.safetensors", "out": tmp_path}
    monkeypatch.setattr(sys, "argv", ["figures.py", *(f"--{name}={path}" for name, path in options.items())])
    script.main()
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"kurtosis.png", "levels.png", "cache.png"}
    page = (SCRIPT.parent / "concepts.md").read_text()
    assert [name for name in made if f"({name})" not in page] == []
