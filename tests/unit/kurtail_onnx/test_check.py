"""The check fails where it should: other kernels, other weights, another graph."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exports import CENTRED
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.graph.model import build_model
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import open_session
from kurtail_onnx.verify import check as checks
from kurtail_onnx.verify.kernels import fused_linears, placement, time_by_part, trace
from kurtail_onnx.verify.layers import compare_layers
from kurtail_onnx.verify.structure import check_structure
from kurtail_onnx.write import save

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed, NotFinite
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.stages import export as stage
from kurtail_pl.stages.export import export


def changed(exported: Path, folder: Path, artefact: Path, change: Callable[[ir.Graph], None]) -> Path:
    """Files of a graph that differs from the exported one."""
    model = build_model(Source(artefact), ONNX())
    change(model.graph)
    folder.mkdir()
    save(model, folder)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((exported / name).read_bytes())
    description = json.loads((exported / "kurtail_export.json").read_text())
    (folder / "kurtail_export.json").write_text(json.dumps(description | {"sha256": {}}))
    return folder


def insert_after(graph: ir.Graph, name: str, op_type: str) -> None:
    """Put a node with one input behind another node."""
    (node,) = [node for node in graph if node.name == name]
    output = node.outputs[0]
    uses = list(output.uses())
    extra = ir.node(op_type, [output], name=f"{name}/{op_type}")
    graph.insert_after(node, extra)
    for user, index in uses:
        user.replace_input_with(index, extra.outputs[0])


def test_an_unfused_linear_fails(artefact: Path, exported: Path, tmp_path: Path) -> None:
    """A weight that is not dequantized right before its product is expanded in every step."""
    name = "/model/layers.1/mlp/up_proj/weight_dq"
    folder = changed(exported, tmp_path / "onnx", artefact, lambda graph: insert_after(graph, name, "Abs"))
    with pytest.raises(CheckFailed, match="27 of 28 quantized linears"):
        checks.check(folder, Source(artefact), ONNX())
    assert not (folder / "checks.json").exists()


def test_logits_that_are_no_numbers_are_an_error(artefact: Path, exported: Path, tmp_path: Path) -> None:
    name = "/model/layers.2/self_attn/attention_output_R4/Hadamard"
    opened = Export(changed(exported, tmp_path / "onnx", artefact, lambda graph: insert_after(graph, name, "Log")))
    with pytest.raises(NotFinite, match=r"model\.onnx gives logits that are nan"):
        Decoder(opened, open_session(opened.model, threads=1)).forward(np.array([[5, 80, 7]]))


def test_another_function_fails(artefact: Path, exported: Path, tmp_path: Path) -> None:
    name = "/model/layers.2/self_attn/attention_output_R4/Hadamard"
    folder = changed(exported, tmp_path / "onnx", artefact, lambda graph: insert_after(graph, name, "Neg"))
    with pytest.raises(CheckFailed, match="does not compute"):
        checks.check(folder, Source(artefact), ONNX())


@pytest.mark.parametrize("place", ["mlp/down_in/centre", "self_attn/key_centre"])
def test_a_forgotten_centre_fails(
    place: str, tiny: Path, make_artefact: Callable[..., Path], exported: Path, tmp_path: Path
) -> None:
    """The bias makes up for a mean that is not subtracted; keys have other codes."""
    artefact = make_artefact(tiny, **CENTRED)

    def forget(graph: ir.Graph) -> None:
        (node,) = [node for node in graph if node.name == f"/model/layers.2/{place}/Sub"]
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, node.inputs[0])

    folder = changed(exported, tmp_path / "onnx", artefact, forget)
    with pytest.raises(CheckFailed, match="does not compute"):
        checks.check(folder, Source(artefact), ONNX())


def test_another_grid_fails(tiny: Path, make_artefact: Callable[..., Path], exported: Path, tmp_path: Path) -> None:
    """The constant of another place."""
    artefact = make_artefact(tiny, activations=Quantizer(4, False), activation_scales="static")

    def swap(graph: ir.Graph) -> None:
        (node,) = [node for node in graph if node.name == "/model/layers.2/mlp/down_in/act_q/QuantizeLinear"]
        (other,) = [node for node in graph if node.name == "/model/layers.2/mlp/gate_up_in/act_q/QuantizeLinear"]
        node.replace_input_with(1, other.inputs[1])

    folder = changed(exported, tmp_path / "onnx", artefact, swap)
    with pytest.raises(CheckFailed, match="does not compute"):
        checks.check(folder, Source(artefact), ONNX())


def test_an_unknown_operator_fails(artefact: Path, exported: Path, tmp_path: Path) -> None:
    name = "/model/layers.0/attention_residual"
    folder = changed(exported, tmp_path / "onnx", artefact, lambda graph: insert_after(graph, name, "Tanh"))
    with pytest.raises(CheckFailed, match="::Tanh"):
        check_structure(folder)


def test_a_failed_check_keeps_nothing(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.TOLERANCES, "fp32", checks.Tolerance(logits=-1.0, codes=0.0, tokens=0.0, layer=0.0))
    with pytest.raises(CheckFailed):
        export(artefact, tmp_path / "onnx", ONNX(), check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_runtimes_default_accuracy_is_not_exact(artefact: Path, exported: Path) -> None:
    """The trap that the profile `exact` avoids: activations rounded to 8 bits a second time."""
    source = Source(artefact)
    exact, fast = (compare_layers(exported, source, ONNX(), profile)[0] for profile in ("exact", "fast"))
    tokens = sum(layer.tokens for layer in exact)
    # Of eight texts and layers, one may hold a value on a border, which all its later tokens read.
    assert sum(layer.tokens_on_a_border for layer in exact) <= tokens / 8
    assert sum(layer.tokens_on_a_border for layer in fast) > tokens / 2
    assert sum(layer.codes_differing for layer in fast) > sum(layer.codes_differing for layer in exact)


def test_every_layer_reports_itself(artefact: Path, exported: Path) -> None:
    layers, head = compare_layers(exported, Source(artefact), ONNX())
    assert len(layers) == 4
    assert head.error < 3e-6  # 48 roundings to 24 bits, 6e-8 each
    for layer in layers:
        # 2 texts of 21 tokens, 2 KV heads of 16, keys and values.
        assert (layer.tokens, layer.codes) == (42, 42 * 2 * 16 * 2)
        assert layer.largest_code_difference <= 1
        assert layer.hidden_error < 5e-6
    # As above; and a token whose value lies on a border may have other codes.
    assert sum(layer.tokens_on_a_border for layer in layers) <= 21
    assert sum(layer.codes_differing for layer in layers) <= 2 * 16 * 2
    assert list(exported.glob(".*")) == []


def test_the_trace_names_kernels(exported: Path) -> None:
    kernels = trace(Export(exported), steps=(5, 1))
    assert fused_linears(kernels) == 4 * 7
    (provider,) = placement(kernels)
    assert provider == "CPUExecutionProvider"
    assert placement(kernels)[provider]["Attention"] == 4
    shares = time_by_part(kernels)
    assert {"hadamard", "act_q", "kv_cache", "linears", "lm_head"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


def test_large_exports_are_checked_on_request_and_without_whole_texts(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LARGEST_BY_DEFAULT", 0)
    assert not (export(artefact, tmp_path / "silent", ONNX()) / "checks.json").exists()
    asked = export(artefact, tmp_path / "asked", ONNX(), check=True)
    written = json.loads((asked / "checks.json").read_text())
    assert written["texts"] == {}
    assert written["layers"]["codes"] == 4 * 42 * 2 * 16 * 2
    assert "| text |" not in (asked / "README.md").read_text()


LAYERS = {"tokens": 168, "codes": 21504, "tokens_on_a_border": 0, "codes_differing": 0}
LAYERS |= {"head_logits_error": 1e-7, "head_logits_step": 0.0}


@pytest.mark.parametrize(
    ("found", "fails"),
    [
        ({}, False),
        # One key that fell on the other side, which all later tokens of a text read; 128 codes are a token's.
        ({"tokens_on_a_border": 20, "largest_share_of_a_layer": 20 / 42, "codes_differing": 5}, False),
        # Every token of one layer of four; the last tokens of all layers; the codes of a layer; another head.
        ({"tokens_on_a_border": 42, "largest_share_of_a_layer": 1.0}, True),
        ({"tokens_on_a_border": 48, "largest_share_of_a_layer": 12 / 42}, True),
        ({"codes_differing": 200}, True),
        ({"head_logits_error": 1e-3}, True),
    ],
)
def test_values_on_a_border_are_no_failure_and_systematic_ones_are(found: dict[str, float], fails: bool) -> None:
    layers = {**LAYERS, "largest_share_of_a_layer": 0.0, **found}
    with pytest.raises(CheckFailed) if fails else nullcontext():
        checks._require_agreement(layers, 4, checks.TOLERANCES["fp32"])
