"""Learned maps and clips in the graph: torch's logits and codes, for every kind of place that has one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exports import checks_of, has_torchs_logits
from kurtail_onnx.exporter import ONNX

import kurtail_pl
from kurtail_pl.methods import RTN, BlockTransforms
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations

WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 160, "num_attention_heads": 10}
"""More channels than one product takes everywhere: 12 x 16, heads 10 x 16, 10 x 16."""
CASES: dict[str, tuple[str, dict[str, Any], bool, ONNX]] = {
    "small, biases": ("llama3", {}, False, ONNX()),
    "behind R3, R4 and R5": ("llama3", {}, True, ONNX("fp64")),
    "experts": ("mixtral", {}, False, ONNX()),
    "wide": ("qwen3", WIDE, False, ONNX("fp64")),
    "float inputs": ("phi3", {}, False, ONNX(act="none")),
}


@pytest.fixture(scope="module")
def make_mapped(
    make_family: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, dict[str, Any], bool], Path]:
    """A family's artefact with all that is trained, in 4 bits everywhere; each is made once."""
    made: dict[str, Path] = {}

    def make(family: str, changes: dict[str, Any], rotated: bool) -> Path:
        key = f"{family} {changes} {rotated}"
        if key not in made:
            place, checkpoint = tmp_path_factory.mktemp("mapped"), Checkpoint(make_family(family, **changes))
            rotations = random_rotations(checkpoint.config, 0) if rotated else Rotations()
            text = TextSpec(str(text_file), windows=2, seqlen=48)
            tuner = BlockTransforms(epochs=2, windows=2, seqlen=48)
            spec = QuantizeSpec(Scheme(), RTN(), text=text, quantized_activations=True, transforms=tuner)
            fused = fuse(checkpoint, rotations, "none", place / "fused")
            made[key] = quantize(fused, spec, place / "artefact")
        return made[key]

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_place_has_its_map(
    case: str, make_mapped: Callable[[str, dict[str, Any], bool], Path], tmp_path: Path
) -> None:
    """Prefill, decoding, chunks and a padded batch; in double all codes of whole texts are torch's."""
    family, changes, rotated, spec = CASES[case]
    artefact = make_mapped(family, changes, rotated)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    if spec.dtype == "fp64":
        assert all(text["codes_differing"] == 0 for text in checks_of(folder)["texts"].values())
    if case == "small, biases":
        assert has_torchs_logits(kurtail_pl.load(artefact), folder)
    description = json.loads((folder / "kurtail_export.json").read_text())
    assert description["maps"]["learned"].startswith("trained on each block's float output")
    assert "and key_transform" in description["cache"]["key_value"]["holds"]
    assert "a learned map at each place" in (folder / "README.md").read_text()


def test_readers_of_one_input_share_its_map(
    make_mapped: Callable[[str, dict[str, Any], bool], Path], tmp_path: Path
) -> None:
    """Two products at each place of a layer, one before the output projection; one of queries and one of keys."""
    folder = export(make_mapped("qwen3", WIDE, False), tmp_path / "onnx", ONNX(), check=False)
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    found = [node.name.removeprefix("/model/layers.1/") for node in nodes if "transform/MatMul" in node.name]
    assert [name for name in found if not name.startswith("/")] == [
        *("self_attn/qkv_in/transform/MatMul", "self_attn/qkv_in/transform/MatMul_1"),
        *("self_attn/key_transform/MatMul", "self_attn/key_transform/MatMul_1"),
        "self_attn/o_in/transform/MatMul",
        *("mlp/gate_up_in/transform/MatMul", "mlp/gate_up_in/transform/MatMul_1"),
        *("mlp/down_in/transform/MatMul", "mlp/down_in/transform/MatMul_1"),
    ]
