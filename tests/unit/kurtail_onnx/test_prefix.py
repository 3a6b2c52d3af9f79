"""A prefix in the graph: constants before all that the cache holds, and columns of the mask that every query sees."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exports import CENTRED, all_equal, has_torchs_logits
from families import QUANTIZED_GRAPHS
from kurtail_onnx.exporter import ONNX

import kurtail_pl
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead
from kurtail_pl.stages.export import export
from kurtail_pl.storage.checkpoint import Checkpoint

MakeArtefact = Callable[..., Path]
MakeFamily = Callable[[str], Path]
PREFIXED: dict[str, Any] = {"prefix": [1, 17]}
FORMS: dict[str, tuple[ONNX, dict[str, Any]]] = {
    "centred-static": (ONNX(), {**CENTRED, **PREFIXED, "activation_scales": "static"}),
    "float-cache": (ONNX(kv="float"), {**CENTRED, **PREFIXED}),
    "never-quantized-cache": (ONNX(), {**PREFIXED, "cache": None}),
    "keys-unlike-values": (ONNX(), {**PREFIXED, "cache": PerTokenHead(Quantizer(4))}),
}


@pytest.mark.parametrize("family", [family for family in QUANTIZED_GRAPHS if family != "hunyuan"])
def test_every_family(family: str, make_family: MakeFamily, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(make_family(family), **PREFIXED)
    model = kurtail_pl.load(artefact)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    assert has_torchs_logits(model, folder)
    # The prefix is what makes these the logits.
    for layer in model.model.layers:
        layer.self_attn.prefix_key = None
    assert not has_torchs_logits(model, folder, tolerance=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, grouped: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, quantizers = FORMS[form]
    artefact = make_artefact(grouped, **quantizers)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)


def test_stories(stories: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """Also of a batch whose second text is padded."""
    quantizers = {**CENTRED, **PREFIXED, "activation_scales": "static"}
    artefact = make_artefact(stories, **quantizers)
    assert all_equal(artefact, export(artefact, tmp_path / "onnx", ONNX(), check=True))


def test_the_cache_holds_the_text_alone(tiny: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(tiny, **PREFIXED)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=False)
    graph = onnx.load(folder / "model.onnx").graph
    nodes, initializers = ({x.name: x for x in xs} for xs in (graph.node, graph.initializer))
    producers = {output: node for node in graph.node for output in node.output}
    for index in range(4):
        attention = nodes[f"/model/layers.{index}/self_attn/Attention"]
        for place, part in ((1, "key"), (2, "value")):
            joined = producers[attention.input[place]]
            assert joined.name.startswith(f"/model/layers.{index}/self_attn/prefix/Concat")
            stored = f"model.layers.{index}.self_attn.prefix_{part}"
            expected = Checkpoint(artefact).tensor(stored).numpy()
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(initializers[stored]), expected)
            assert expected.shape == (2, 2, 16)
    outputs = {value.name for value in graph.output}
    assert not any(set(node.output) & outputs for node in graph.node if "/prefix/" in node.name)


def test_the_description_and_the_card_say_it(
    exported: Path, tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    folder = export(make_artefact(tiny, **PREFIXED), tmp_path / "onnx", ONNX(), check=False)
    plain, prefixed = (json.loads((place / "kurtail_export.json").read_text()) for place in (exported, folder))
    assert plain["prefix"] is None
    assert prefixed["prefix"]["tokens"] == [1, 17]
    cards = [(place / "README.md").read_text() for place in (exported, folder)]
    assert ["before every text: float keys and values of the tokens [1, 17]" in card for card in cards] == [False, True]
