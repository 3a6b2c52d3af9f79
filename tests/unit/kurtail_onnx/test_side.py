"""A side of low rank in the graph: torch's logits and codes, the thin product once for all that read the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exports import CENTRED, checks_of
from kurtail_onnx.exporter import ONNX

from kurtail_pl.methods import LowRank, Uniform
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
SIDE: dict[str, Any] = {"side": LowRank(6)}
CASES: dict[str, tuple[str, ONNX, dict[str, Any]]] = {
    "whole texts, centred": ("llama3", ONNX("fp64"), {**CENTRED, "weights": Uniform(4, False)}),
    "experts": ("mixtral", ONNX(), {}),
    "integers": ("qwen3", ONNX(weights="integer"), {}),
    "float inputs": ("phi3", ONNX(act="none"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_linear_has_its_side(
    case: str, make_family: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    family, spec, scheme = CASES[case]
    folder = export(make_artefact(make_family(family), **SIDE, **scheme), tmp_path / "onnx", spec, check=True)
    if spec.dtype == "fp64":
        assert all(text["codes_differing"] == 0 for text in checks_of(folder)["texts"].values())
    description = json.loads((folder / "kurtail_export.json").read_text())
    assert description["side"]["kept"].startswith("a side of rank 6 in 16 bits")
    assert "- beside the weights: a side of rank 6" in (folder / "README.md").read_text()


def test_readers_of_one_input_share_the_thin_product(tiny: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    folder = export(make_artefact(tiny, **SIDE), tmp_path / "onnx", ONNX(), check=False)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = [node.name for node in graph.node if "/layers.2/" in node.name and node.name.endswith("side/MatMul")]
    readers = {"self_attn": ["qkv_in", "q_proj", "k_proj", "v_proj", "o_in", "o_proj"],
               "mlp": ["gate_up_in", "gate_proj", "up_proj", "down_in", "down_proj"]}  # fmt: skip
    expected = [f"/model/layers.2/{block}/{name}/side/MatMul" for block, names in readers.items() for name in names]
    assert sorted(found) == sorted(expected)
    kept = {value.name: value.data_type for value in graph.initializer if ".side_" in value.name}
    assert kept["model.layers.2.self_attn.q_proj.side_down"] == onnx.TensorProto.FLOAT16
