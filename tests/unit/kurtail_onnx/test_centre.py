"""Centred inputs: `Sub` before the quantizer, once a place, and a bias that makes up for it. Centred keys: one more."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import CENTRED, all_equal, checks_of, has_torchs_logits, linears_of
from families import QUANTIZED_GRAPHS
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.perplexity import perplexity
from kurtail_onnx.run.session import open_session
from transformers import PreTrainedModel

import kurtail_pl
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods import PerTokenHead, Uniform
from kurtail_pl.stages.evaluation import perplexity as evaluate
from kurtail_pl.stages.export import export
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.attention import Scored, watched_scores

MakeArtefact = Callable[..., Path]
MakeFamily = Callable[[str], Path]
SYMMETRIC = {"centre": True, "cache": PerTokenHead(centre_keys=True)}


def torchs(artefact: Path, act: str = "qdq") -> PreTrainedModel:
    """The artefact's model; with float activations where the export has them."""
    model = kurtail_pl.load(artefact)
    for linear in linears_of(model):
        linear.activations = linear.activations if act == "qdq" else None
    return model


@pytest.mark.parametrize("family", QUANTIZED_GRAPHS)
def test_every_family(family: str, make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(make_family(family), **CENTRED)
    model = torchs(artefact)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    count = len(linears_of(model))
    assert checks_of(folder)["linears"] == {"quantized": count, "fused": count}
    assert has_torchs_logits(model, folder)
    # The centres are what makes these the logits.
    for linear in linears_of(model):
        linear.centre = None
    assert not has_torchs_logits(model, folder, tolerance=0.01)


FORMS: dict[str, tuple[ONNX, dict[str, Any]]] = {
    "symmetric": (ONNX(), SYMMETRIC),
    "kernel": (ONNX(weights="matmulnbits"), CENTRED),
    "integer": (ONNX(weights="integer"), SYMMETRIC),
    "float-activations": (ONNX(act="none"), CENTRED),
    "float-cache": (ONNX(kv="float"), CENTRED),
    "float-weights": (ONNX(), {**CENTRED, "weights": None}),
    "groups": (ONNX(), {**CENTRED, "weights": Uniform(4, False, group_size=16)}),
    "scale-a-head": (ONNX(), {**CENTRED, "attention_output": "head"}),
    "keys-unlike-values": (ONNX(), {**CENTRED, "cache": replace(CENTRED["cache"], keys=Quantizer(4, True))}),
    "keys-alone": (ONNX(), {"cache": PerTokenHead(values=None, centre_keys=True)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, grouped: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, quantizers = FORMS[form]
    artefact = make_artefact(grouped, **quantizers)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    assert has_torchs_logits(torchs(artefact, spec.act), folder)


@pytest.mark.parametrize("form", ["integer", "float-activations"])
def test_experts_in_other_forms(
    form: str, make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    spec, quantizers = FORMS[form]
    artefact = make_artefact(make_family("mixtral"), **quantizers)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    assert has_torchs_logits(torchs(artefact, spec.act), folder)


def test_stories(centred_stories: Path, tmp_path: Path) -> None:
    folder = export(centred_stories, tmp_path / "onnx", ONNX(), check=True)
    assert all_equal(centred_stories, folder)
    text = TextSpec(windows=2, seqlen=128)
    expected = evaluate.perplexity(Checkpoint(centred_stories), text)["perplexity"]
    # A value on a border moves what comes after it by a thousandth and more.
    assert perplexity(Export(folder), text) == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_a_float_cache_holds_centred_keys(centred_stories: Path, tmp_path: Path) -> None:
    """Of a batch whose second text is padded; what the rotated keys are is seen in torch's attention."""
    folder = export(centred_stories, tmp_path / "onnx", ONNX(kv="float"), check=False)
    ids = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    decoder = Decoder(opened := Export(folder), open_session(opened.model, threads=1), batch=2)
    decoder.forward(ids.numpy(), mask.numpy())
    model, checkpoint = kurtail_pl.load(centred_stories), Checkpoint(centred_stories)
    seen: list[Scored] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.enter_context(watched_scores(layer.self_attn, seen.append))
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for index, (_, keys, *_) in enumerate(seen):
        centre = checkpoint.tensor(f"model.layers.{index}.self_attn.key_centre").float()
        expected = fake_quantize(keys - centre, CENTRED["cache"].keys).numpy()
        found = decoder.cache()[f"past_key_values.{index}.key"]
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(found[1, :, 5:], expected[1, :, 5:], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_biases_of_the_models_own(make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(make_family("qwen2"), **CENTRED)
    assert all_equal(artefact, export(artefact, tmp_path / "onnx", ONNX(), check=True))


def test_one_subtraction_a_place_with_the_artefacts_names(
    tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    folder = export(make_artefact(tiny, **CENTRED), tmp_path / "onnx", ONNX(), check=False)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = {
        "self_attn": {"qkv_in": "q_proj", "o_in": "o_proj"},
        "mlp": {"gate_up_in": "gate_proj", "down_in": "down_proj"},
    }
    expected = {
        f"/model/layers.{index}/{block}/{place}/centre/Sub": f"model.layers.{index}.{block}.{reader}.centre"
        for index in range(4)
        for block, readers in places.items()
        for place, reader in readers.items()
    }
    assert {node.name for node in graph.node if "/centre/Sub" in node.name} == set(expected)
    assert {i.name for i in graph.initializer if i.name.endswith(".centre")} == set(expected.values())
    nodes = {node.name: node for node in graph.node}
    rotation = nodes["/model/layers.2/mlp/mlp_hidden_R5/Hadamard"].output[0]
    centre = nodes["/model/layers.2/mlp/down_in/centre/Sub"]
    whole = nodes["/model/layers.2/mlp/down_in/Reshape"]
    assert whole.input[0] == rotation
    assert centre.input[0] == whole.output[0]
    assert nodes["/model/layers.2/mlp/down_in/act_q/Reshape"].input[0] == centre.output[0]


def test_keys_are_centred_between_R3_and_the_cache(  # noqa: N802 - the paper's name
    tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(tiny, **CENTRED)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=False)
    graph = onnx.load(folder / "model.onnx").graph
    nodes, initializers = ({x.name: x for x in xs} for xs in (graph.node, graph.initializer))
    producers = {output: node for node in graph.node for output in node.output}
    subtractions = [name for name in nodes if name.endswith("/key_centre/Sub")]
    assert subtractions == [f"/model/layers.{index}/self_attn/key_centre/Sub" for index in range(4)]
    for index, name in enumerate(subtractions):
        split, widened = (producers[source] for source in nodes[name].input)
        # Queries come first.
        assert nodes[name].input[0] == split.output[1]
        assert split.input[0] == nodes[f"/model/layers.{index}/self_attn/query_key_R3/Hadamard"].output[0]
        stored = f"model.layers.{index}.self_attn.key_centre"
        assert list(widened.input) == [stored]
        expected = Checkpoint(artefact).tensor(stored).numpy()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(initializers[stored]), expected)
        assert expected.shape == (2, 1, 16)
        readers = {node.name for node in graph.node if nodes[name].output[0] in node.input}
        assert readers == {f"/model/layers.{index}/self_attn/kv_cache/Concat"}


def test_the_description_and_the_card_say_it(
    exported: Path, tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    folder = export(make_artefact(tiny, **CENTRED), tmp_path / "onnx", ONNX(act="none"), check=False)
    plain, centred = (json.loads((place / "kurtail_export.json").read_text()) for place in (exported, folder))
    assert plain["centre"] is None
    assert plain["key_centre"] is None
    assert centred["centre"]["formula"] == ["x = x - centre", "y = quantized(x) @ weight.T + bias"]
    assert centred["key_centre"]["formula"] == ["key = key - key_centre"]
    holds = "keys after the rotary embedding and R3", ", then as many heads of values"
    assert plain["cache"]["key_value"]["holds"] == "".join(holds)
    assert centred["cache"]["key_value"]["holds"] == ", less key_centre".join(holds)
    cards = [(place / "README.md").read_text() for place in (exported, folder)]
    assert [card.count("mean subtracted") for card in cards] == [0, 2]
