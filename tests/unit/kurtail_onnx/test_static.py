"""Static grids: a quantizer with constants, a product with the scale, and nothing that depends on the token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exports import CENTRED, all_equal, checks_of, has_torchs_logits, linears_of
from families import QUANTIZED_GRAPHS
from graphs import random_array, run_graph
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.graph.activations import fake_quantized_on, integer_rows
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.grids import GridNodes
from kurtail_onnx.graph.weights import initializer

import kurtail_pl
from kurtail_pl.maths.quantizers import Grid, Quantizer, fake_quantize, quantize
from kurtail_pl.methods import Uniform
from kurtail_pl.stages.export import export
from kurtail_pl.storage.checkpoint import Checkpoint

MakeArtefact = Callable[..., Path]
MakeFamily = Callable[[str], Path]
STATIC: dict[str, Any] = {"activation_scales": "static"}
OFF_CENTRE: dict[str, Any] = {**STATIC, "activations": Quantizer(4, False)}
SIZE = 48


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_torchs_bit_for_bit(bits: int, symmetric: bool) -> None:
    quantizer, scale, zero = Quantizer(bits, symmetric), np.array(0.0371, np.float32), 5
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", "tokens", SIZE])
    dtype = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    point = initializer(g, "zero", dtype, (), lambda: torch.tensor([zero], dtype=torch.uint8))
    grid = GridNodes(g.constant(scale, "scale"), None if symmetric else point)
    values = random_array(2, 7, SIZE)
    (found,) = run_graph(g, {"y": fake_quantized_on(g, x, grid, quantizer)}, x=values)
    one = Grid(torch.tensor([float(scale)]), None if symmetric else torch.tensor([float(zero)]))
    np.testing.assert_array_equal(found, fake_quantize(torch.from_numpy(values), quantizer, one).numpy())
    assert len(np.unique(found)) > 10


def test_integer_rows_are_the_codes() -> None:
    g = GraphBuilder(ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", "tokens", SIZE])
    values, quantizer = random_array(2, 7, SIZE), Quantizer(4)
    grid = GridNodes(g.scalar(0.3), None)
    rows = integer_rows(g, x, SIZE, quantizer, g.ints(2, 7, -1), grid)
    (codes,) = run_graph(g, {"codes": rows.codes}, x=values)
    expected = quantize(torch.from_numpy(values), quantizer, Grid(torch.tensor([0.3]), None))
    np.testing.assert_array_equal(codes, expected.codes.reshape(-1, SIZE).numpy())
    assert rows.scale is grid.scale


@pytest.mark.parametrize("family", QUANTIZED_GRAPHS)
def test_every_family(family: str, make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(make_family(family), **OFF_CENTRE)
    model = kurtail_pl.load(artefact)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    count = len(linears_of(model))
    assert checks_of(folder)["linears"] == {"quantized": count, "fused": count}
    assert has_torchs_logits(model, folder)
    # The grids are what makes these the logits.
    for linear in linears_of(model):
        linear.input_scale = None
    assert not has_torchs_logits(model, folder, tolerance=0.01)


FORMS: dict[str, tuple[ONNX, dict[str, Any]]] = {
    "symmetric": (ONNX(), STATIC),
    "centred": (ONNX(), {**CENTRED, **STATIC}),
    "kernel": (ONNX(weights="matmulnbits"), OFF_CENTRE),
    "integer": (ONNX(weights="integer"), STATIC),
    "integer-centred": (ONNX(weights="integer"), {**STATIC, "centre": True}),
    "float-activations": (ONNX(act="none"), STATIC),
    "float-weights": (ONNX(), {**OFF_CENTRE, "weights": None}),
    "float-cache": (ONNX(kv="float"), OFF_CENTRE),
    "groups": (ONNX(), {**OFF_CENTRE, "weights": Uniform(4, False, group_size=16)}),
    # ONNX Runtime has an int8 kernel that would take these two, were the scale a DequantizeLinear's own.
    "eight-bits": (ONNX(), {**STATIC, "activations": Quantizer(8), "weights": Uniform(8)}),
    "eight-bits-off-centre": (ONNX(), {**STATIC, "activations": Quantizer(8, False), "weights": Uniform(8)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, grouped: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, quantizers = FORMS[form]
    artefact = make_artefact(grouped, **quantizers)
    model = kurtail_pl.load(artefact)
    for linear in linears_of(model):
        linear.activations = linear.activations if spec.act == "qdq" else None
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    assert has_torchs_logits(model, folder)


@pytest.mark.parametrize("form", ["integer", "float-activations", "centred"])
def test_experts_in_other_forms(
    form: str, make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    spec, quantizers = FORMS[form]
    artefact = make_artefact(make_family("mixtral"), **quantizers)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    model = kurtail_pl.load(artefact)
    for linear in linears_of(model):
        linear.activations = linear.activations if spec.act == "qdq" else None
    assert has_torchs_logits(model, folder)


@pytest.mark.parametrize("quantizers", [STATIC, {**CENTRED, **STATIC}], ids=["symmetric", "centred"])
def test_stories(stories: Path, quantizers: dict[str, Any], make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(stories, **quantizers)
    assert all_equal(artefact, export(artefact, tmp_path / "onnx", ONNX(), check=True))


def test_three_nodes_a_place_with_the_artefacts_constants(
    tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(tiny, **OFF_CENTRE)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=False)
    graph = onnx.load(folder / "model.onnx").graph
    nodes, initializers = ({x.name: x for x in xs} for xs in (graph.node, graph.initializer))
    place = "/model/layers.2/mlp/down_in/act_q"
    assert [name for name in nodes if name.startswith(place)] == [
        f"{place}/{op}" for op in ("QuantizeLinear", "DequantizeLinear", "Mul")
    ]
    reader = "model.layers.2.mlp.down_proj"
    scale, zero_point = f"{reader}.input_scale", f"{reader}.input_zero_point"
    rotated = nodes["/model/layers.2/mlp/mlp_hidden_R5/Hadamard"].output[0]
    whole = nodes["/model/layers.2/mlp/down_in/Reshape"]
    assert whole.input[0] == rotated
    assert list(nodes[f"{place}/QuantizeLinear"].input) == [whole.output[0], scale, zero_point]
    assert nodes[f"{place}/DequantizeLinear"].input[2] == zero_point
    assert nodes[f"{place}/Mul"].input[1] == scale
    stored = Checkpoint(artefact)
    assert onnx.numpy_helper.to_array(initializers[scale]) == stored.tensor(scale).item()
    assert initializers[zero_point].data_type == onnx.TensorProto.UINT4
    assert int(onnx.numpy_helper.to_array(initializers[zero_point])) == stored.tensor(zero_point).item()
    # A place has one grid, the first reader's.
    assert sum(name.endswith(".input_scale") for name in initializers) == 4 * 4
    assert not any("/act_q/Reduce" in name for name in nodes)


def test_the_description_and_the_card_say_it(
    exported: Path, tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    folder = export(make_artefact(tiny, **OFF_CENTRE), tmp_path / "onnx", ONNX(), check=False)
    plain, static = (json.loads((place / "kurtail_export.json").read_text()) for place in (exported, folder))
    assert plain["static_grids"] is None
    assert "input_scale" in static["static_grids"]["tensors"]
    for part in ("activations", "attention_output"):
        assert static["quantizers"][part]["formula"] == [
            "code = clip(round_half_even(x / scale) + zero_point, 0, 15)",
            "value = (code - zero_point) * scale",
        ]
    assert any("max" in line for line in static["quantizers"]["keys"]["formula"])
    cards = [(place / "README.md").read_text() for place in (exported, folder)]
    assert ["one calibrated grid" in card for card in cards] == [False, True]
