"""A recipe for a runtime: refused before any work where it asks for more, and made by the runtime's rules."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import kurtail_pl
from kurtail_pl.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("vllm", (), "write quantization.scheme.activations.clip.amount: 1.0"),
        ("llama.cpp", (), "write quantization.scheme.weights.scales: float16"),
        (
            "vllm",
            ("--quantization.scheme.activations", "null", "--quantization.scheme.cache", "null"),
            "does not compute R3 (query_key) at run time: write fusion.online: [attention_output, mlp_hidden]",
        ),
        (
            "onnxruntime",
            ("--quantization.scheme.activations.bits", "5"),
            "write quantization.scheme.activations.bits: 4",
        ),
    ],
)
def test_more_than_a_runtime_has_is_refused_before_any_work(
    kurtail: Kurtail,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match=r"1|2"):
        kurtail(recipe.parent, "fit", "--config", recipe, "--target", target, *options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kurtail ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert len(lines[0]) <= 300
    assert not (recipe.parent / "runs" / "store").exists()


def test_an_unknown_target_is_refused(kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kurtail(recipe.parent, "fit", "--config", recipe, "--target", "tensorrt")
    assert "target is tensorrt, expected one of 'torch', 'onnxruntime', 'llama.cpp', 'vllm'" in capsys.readouterr().err


def test_a_model_for_vllm(kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = recipe.parent
    out = "artifacts/tied-kurtail-vllm-w4a4kv4"
    kurtail(place, "fit", "--config", recipe, "--config", "vllm", "--quantization.out", out)
    card = json.loads((place / out / "kurtail.json").read_text())
    assert (card["method"], card["quantize"]["target"]) == ("kurtail-vllm", "vllm")
    assert card["scheme"]["cache"]["kind"] == "Int4PerTokenHead"
    assert card["rotations"]["cache"]["kind"] == "Int4PerTokenHead"
    assert {name.partition(".")[0] for name in load_file(place / out / "rotations.safetensors")} == {
        "residual", "value", "attention_output", "mlp_hidden",
    }  # fmt: skip
    page = (place / out / "README.md").read_text()
    assert "Made for vllm: rounded and evaluated by its rules." in page
    assert "- cache: turned by a random Hadamard" in page
    kept = yaml.safe_load((place / out / "recipe.yaml").read_text())
    assert kept["target"] == "vllm"
    assert "target" not in kept["quantization"]
    kurtail(place, "inspect", out)
    assert "fused; R4, R5 at run time" in capsys.readouterr().out


def test_rotations_that_a_fused_model_has_are_looked_at(kurtail: Kurtail, tied: Path, tmp_path: Path) -> None:
    kurtail(tmp_path, "fuse", "--model", tied, "--method", "quarot", "--out", "fused")
    options = ("--spec.rounder", "RTN", "--spec.scheme.weights.scales", "float16", "--spec.scheme.activations", "null")
    with pytest.raises(SystemExit, match="1"):
        kurtail(
            tmp_path, "quantize", "--artefact", "fused", "--out", "quantized", "--spec.target", "llama.cpp",
            "--spec.scheme.cache", "null", *options,
        )  # fmt: skip
    assert not (tmp_path / "quantized").exists()


def test_from_python(tied: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(ConfigError, match=r"target is vllm, and .*clip\.amount: 1\.0"):
        kurtail_pl.quantize(tied, recipe=str(recipe), target="vllm")
