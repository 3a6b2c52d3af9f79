"""`kurtail plan` on a configuration without weights, and what `fit` makes of a plan that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kurtail_pl.cli import refusals

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]


def test_config_json_alone_is_enough(
    kurtail: Kurtail, recipe: Path, tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of eighty layers and no weights at all; its embedding alone does not fit anywhere."""
    model = tmp_path / "huge"
    model.mkdir()
    config = json.loads((tied / "config.json").read_text())
    huge = {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "vocab_size": 2_000_000_000,
    }
    (model / "config.json").write_text(json.dumps(config | huge))
    kurtail(tmp_path, "plan", "--config", recipe, "--data.init_args.capture.model", model)
    printed = capsys.readouterr().out
    stages = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert stages == ["stage", "--------", "capture", "learn", "fuse", "quantize", "evaluate"]
    assert "does not fit: fuse needs" in printed
    assert "every stage fits" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge", "recipe.yaml"]


def test_a_plan_that_fits_says_so(
    kurtail: Kurtail, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kurtail(tmp_path, "plan", "--config", recipe)
    assert capsys.readouterr().out.splitlines()[-1] == "every stage fits the memory and the disk that are free here"


def test_fit_refuses_what_does_not_fit(
    kurtail: Kurtail, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refusals, "free_memory", lambda: 10**6)
    with pytest.raises(SystemExit):
        kurtail(tmp_path, "fit", "--config", recipe)
    error = capsys.readouterr().err
    assert "capture needs" in error
    assert "and 1.0 MB are free: fewer windows or rows" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
