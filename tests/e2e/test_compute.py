"""One setting for a whole recipe: what it decides is written down, and work in one type is not taken for another's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]
COMPUTE = "--data.init_args.compute"


def test_a_recipe_in_bfloat16(
    kurtail: Kurtail, recipe: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kurtail(tmp_path, "fit", "--config", recipe, f"{COMPUTE}.dtype", "bfloat16", f"{COMPUTE}.device", "cpu")
    (results,) = tmp_path.glob("artifacts/*/results.json")
    assert json.loads(results.read_text())["evaluation"]["dtype"] == "bfloat16"
    assert json.loads((results.parent / "kurtail.json").read_text())["dtype"] == "bfloat16"
    manifest = json.loads((tmp_path / "runs" / "store" / "manifest.json").read_text())
    assert manifest["origin"]["dtype"] == "bfloat16"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        kurtail(tmp_path, "fit", "--config", recipe, "--overwrite")
    assert "dtype is 'bfloat16', wanted 'float32'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(
    kurtail: Kurtail, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing runs; a plan for it can be made all the same, without seconds."""
    with pytest.raises(SystemExit):
        kurtail(tmp_path, "fit", "--config", recipe, f"{COMPUTE}.device", "cuda")
    assert "finds no CUDA device here; choose cpu or auto" in capsys.readouterr().err
    kurtail(tmp_path, "plan", "--config", recipe, f"{COMPUTE}.device", "cuda")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert all("B" in row[2] and row[6].strip() == "-" for row in rows[2:])
    kurtail(tmp_path, "plan", "--config", recipe)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[2].strip() for row in rows[2:]] == ["-"] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
