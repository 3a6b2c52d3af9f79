"""The head in codes of 8 bits: its codes, what the runtime makes of them, the check, its size, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exports import checks_of
from graphs import random_array, run_graph
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.head import rounded_weight
from kurtail_onnx.verify import check as checks
from kurtail_onnx.verify.head import RoundedHead, compare_heads
from kurtail_onnx.verify.layers import compare_layers
from onnx import numpy_helper

from kurtail_pl.artefact.source import Source
from kurtail_pl.cli.main import main
from kurtail_pl.errors import CheckFailed, ConfigError
from kurtail_pl.stages.export import export
from kurtail_pl.stages.inspection.facts import facts_of

MakeArtefact = Callable[..., Path]
ROUNDED = ONNX(head="int8")


@pytest.fixture(scope="module")
def grouped_artefact(grouped: Path, make_artefact: MakeArtefact) -> Path:
    """Of a hidden size of 64."""
    return make_artefact(grouped)


@pytest.fixture(scope="module")
def rounded(grouped_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(grouped_artefact, tmp_path_factory.mktemp("rounded") / "onnx", ROUNDED, check=True)


def brute_force(weight: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales, number by number: the float32 quotient's nearest integer, of two the even one."""
    codes, scales = [], []
    for row in weight.float().numpy():
        blocks = [row[start : start + 32] for start in range(0, len(row), 32)]
        steps = [np.abs(block).max() / np.float32(127) or np.float32(1) for block in blocks]
        scales.append([float(step) for step in steps])
        # Python rounds half to even.
        codes.append([round(float(x / step)) for block, step in zip(blocks, steps, strict=True) for x in block])
    return codes, scales


def test_codes_are_the_nearest_ones() -> None:
    weight = torch.from_numpy(random_array(40, 96))
    codes, scales = brute_force(weight)
    found = rounded_weight(weight)
    assert found.codes.tolist() == codes
    assert found.scale.tolist() == scales


def test_the_file_holds_them(rounded: Path, grouped_artefact: Path) -> None:
    model = onnx.load(rounded / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if i.name.startswith("lm_head.")}
    weight = Source(grouped_artefact).tensor("lm_head.weight")
    codes, scales = brute_force(weight)
    assert set(stored) == {"lm_head.weight.codes", "lm_head.weight.scale"}
    assert stored["lm_head.weight.codes"].shape == (len(weight), 2, 32)
    np.testing.assert_array_equal(stored["lm_head.weight.codes"].reshape(weight.shape).astype(int) - 128, codes)
    np.testing.assert_array_equal(stored["lm_head.weight.scale"].reshape(len(weight), 2), np.float32(scales))


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_kernel_computes_the_mirror(tokens: int) -> None:
    """ONNX Runtime's product beside that of integers in double; an input on a border may move it by one step."""
    weight, x = random_array(80, 96, seed=1), random_array(2, tokens, 96, seed=2)
    codes, scale = rounded_weight(torch.from_numpy(weight))
    g = GraphBuilder(ir.DataType.FLOAT)
    inputs = [
        g.input("x", ir.DataType.FLOAT, [2, tokens, 96]),
        g.constant((codes.numpy().astype(int) + 128).astype(np.uint8).reshape(80, 3, 32), "codes"),
        g.constant(scale.flatten().numpy(), "scale"),
    ]
    product = g.op("MatMulNBits", *inputs, domain="com.microsoft", K=96, N=80, bits=8, block_size=32, accuracy_level=4)
    (found,) = run_graph(g, {"y": product}, x=x)
    blocks = x.reshape(2, tokens, 3, 1, 32).astype(np.float64)
    step = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-300) / 127
    read = np.round(blocks / step)
    expected = (read * codes.numpy().reshape(80, 3, 32).swapaxes(0, 1)).sum(-1) * step[..., 0]
    expected = (expected * scale.numpy().T).sum(2)
    border = float(step.max() * np.abs(weight).max())
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max() + border
    assert np.median(np.abs(found - expected)) <= 1e-6 * np.abs(expected).max()
    mirror = RoundedHead(torch.from_numpy(weight))
    agreement = compare_heads(mirror, torch.from_numpy(x), found)
    assert agreement.error <= 1e-6 + agreement.step
    assert agreement.step == pytest.approx(border / np.abs(expected).max(), rel=0.01)


def test_the_check_compares_with_the_mirror(rounded: Path, grouped_artefact: Path) -> None:
    found = checks_of(rounded)
    assert found["linears"]["quantized"] == found["linears"]["fused"]
    assert found["operators"]["MatMulNBits"] == 1
    layers = found["layers"]
    assert layers["head_logits_error"] <= 1e-5 + layers["head_logits_step"]
    assert 0 < layers["head_logits_step"] < 0.01
    # Against the float head it is an error.
    _, head = compare_layers(rounded, Source(grouped_artefact), ONNX())
    assert head.error > 1e-4
    assert head.step == 0


def test_another_head_fails(rounded: Path, grouped_artefact: Path) -> None:
    with pytest.raises(CheckFailed, match="does not compute"):
        checks.check(rounded, Source(grouped_artefact), ONNX())


def test_it_is_half_of_float16(rounded: Path, grouped_artefact: Path, tmp_path: Path) -> None:
    wide = export(grouped_artefact, tmp_path / "onnx", ONNX(dtype="fp16"), check=False)
    narrow = export(grouped_artefact, tmp_path / "narrow", replace(ROUNDED, dtype="fp16"), check=True)
    rows, columns = Source(grouped_artefact).tensor("lm_head.weight").shape
    saved = (wide / "model.onnx.data").stat().st_size - (narrow / "model.onnx.data").stat().st_size
    # Codes of a byte, and a scale of two for each 32; tensors are aligned.
    assert saved == pytest.approx(rows * columns * (2 - 1 - 2 / 32), abs=3 * 4096)


def test_card_description_and_inspection_say_so(rounded: Path, exported: Path) -> None:
    description = json.loads((rounded / "kurtail_export.json").read_text())
    assert description["export"]["settings"]["head"] == "int8"
    assert description["quantizers"]["head"]["group_size"] == 32
    assert "accuracy level 4" in description["head"]["where"]
    assert "head int8" in (rounded / "README.md").read_text()
    assert facts_of(rounded).weights == "4-bit integers; head: 8-bit integers, in groups of 32"
    assert facts_of(exported).weights == "4-bit integers"
    assert json.loads((exported / "kurtail_export.json").read_text())["head"] is None


def test_refusals(artefact: Path, grouped_artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows of 48 and int8 blocks of 32; export with --to.head float"):
        export(artefact, tmp_path / "onnx", ROUNDED)
    with pytest.raises(ConfigError, match=r"--to.head int8 has no doubles; with --to.dtype fp64 use --to.head float"):
        export(grouped_artefact, tmp_path / "onnx", replace(ROUNDED, dtype="fp64"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_head_is_refused(grouped_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--artefact", str(grouped_artefact), "--to", "onnx", "--out", str(tmp_path / "onnx")]
    with pytest.raises(SystemExit):
        main([*command, "--to.head", "q4_0"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "head is 'q4_0': Input should be 'float' or 'int8'" in line
    assert not (tmp_path / "onnx").exists()
