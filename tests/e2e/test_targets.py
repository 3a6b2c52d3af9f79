"""A recipe for a runtime: refused before any work where it asks for more, and made by the runtime's rules."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from families import fill
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="module")
def wide(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads and widths are what both runtimes' kernels take."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    folder = tmp_path_factory.mktemp("models") / "wide"
    fill(LlamaForCausalLM(config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("target", "overlay", "exporter", "cache", "online", "rule"),
    [
        (
            "vllm", "vllm", "vllm", "Int4PerTokenHead", {"attention_output", "mlp_hidden"},
            "- cache: turned by a random Hadamard",
        ),
        ("llama.cpp", "llama-cpp", "gguf", "Q4_0Cache", set(), "- inputs of linears: codes of 8 bits in blocks of 32"),
    ],
)  # fmt: skip
def test_a_model_for_a_runtime(
    kurtail: Kurtail,
    recipe: Path,
    wide: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    overlay: str,
    exporter: str,
    cache: str,
    online: set[str],
    rule: str,
) -> None:
    """Learned, rounded and evaluated by its rules, exported, and checked against the artefact."""
    pytest.importorskip({"vllm": "compressed_tensors", "gguf": "xllamacpp"}[exporter])
    place, out = recipe.parent, f"artifacts/wide-{overlay}"
    model = ("--data.init_args.capture.model", wide, "--data.init_args.capture.rows", "200")
    kurtail(place, "fit", "--config", recipe, "--config", overlay, "--quantization.out", out, *model)
    card = json.loads((place / out / "kurtail.json").read_text())
    assert (card["method"], card["quantize"]["target"]) == (f"kurtail-{overlay}", target)
    assert card["scheme"]["cache"]["kind"] == card["rotations"]["cache"]["kind"] == cache
    names = {name.partition(".")[0] for name in load_file(place / out / "rotations.safetensors")}
    assert names == {"residual", "value"} | online
    page = (place / out / "README.md").read_text()
    assert f"Made for {target}: rounded and evaluated by its rules." in page
    assert rule in page
    kept = yaml.safe_load((place / out / "recipe.yaml").read_text())
    assert kept["target"] == target
    assert "target" not in kept["quantization"]
    kurtail(place, "export", "--artefact", out, "--to", exporter, "--out", "export")
    assert (place / "export" / "checks.json").is_file()
    capsys.readouterr()
    kurtail(place, "inspect", "export")
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {target.replace('vllm', 'vLLM')}")
    ]
    assert any("| exact" in row for row in rows)


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
