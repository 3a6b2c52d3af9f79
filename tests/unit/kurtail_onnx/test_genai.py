"""Exports with a float cache in onnxruntime-genai."""

from pathlib import Path

import pytest
import torch
from kurtail_onnx.exporter import ONNX

import kurtail_pl
from kurtail_pl.stages.export import export

genai = pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize("artefact", ["story_artefact", "centred_stories"])
@pytest.mark.parametrize("act", ["qdq", "none"])
def test_greedy_text_is_transformers(act: str, artefact: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made = request.getfixturevalue(artefact)
    folder = export(made, tmp_path / "onnx", ONNX(kv="float", act=act), check=False)  # type: ignore[arg-type]
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=30, do_sample=False)
    generator = genai.Generator(model, parameters)
    ids = genai.Tokenizer(model).encode("Once upon a time")
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    reference = kurtail_pl.load(made)
    for module in reference.modules():
        if act == "none" and hasattr(module, "activations"):
            module.activations = None
    expected = reference.generate(torch.tensor([ids.tolist()]), max_length=30, do_sample=False)
    assert list(generator.get_sequence(0)) == expected[0].tolist()
