"""Texts that grow over longrope's border, beyond which all of their tokens have other angles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import rope
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.generate import Sampling, generate
from kurtail_onnx.run.session import open_session
from numpy.typing import NDArray
from transformers import PreTrainedModel

import kurtail_pl
from kurtail_pl.errors import InputError
from kurtail_pl.stages.export import export

BORDER, END = 32, 48
FLOAT: dict[str, Any] = dict.fromkeys(("weights", "activations", "cache"))
"""A code on a border would change all that follows; angles are the same for every scheme."""
IDS = np.random.default_rng(0).integers(2, 300, size=(2, END))
Opened = tuple[PreTrainedModel, Export, Any]


@pytest.fixture(scope="module", params=["phi3", "qwen3"])
def opened(
    request: pytest.FixtureRequest,
    make_family: Callable[..., Path],
    make_artefact: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Opened:
    """torch's model and the export, of a family that makes its cache anew by itself in transformers, and of another."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.5 * i for i in range(8)]}
    longrope = rope("longrope", original_max_position_embeddings=BORDER, **factors)
    changes = {} if request.param == "phi3" else longrope
    artefact = make_artefact(make_family(request.param, **changes), **FLOAT)
    folder = export(artefact, tmp_path_factory.mktemp("onnx") / "onnx", ONNX(), check=True)
    return kurtail_pl.load(artefact), Export(folder), open_session(folder / "model.onnx", threads=1)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[Any]:
    """torch's logits of whole texts at once."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    logits = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions).logits
    found: NDArray[Any] = logits.numpy()
    return found


def near(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("steps", [[1] * END, [BORDER, *[1] * 4], [BORDER + 1, 3], [10, 30, 8], [BORDER - 1, 1, 1, 1]])
def test_every_step_has_the_logits_of_the_whole_text_so_far(opened: Opened, steps: list[int]) -> None:
    model, folder, session = opened
    decoder, done = Decoder(folder, session), 0
    for count in steps:
        done += count
        found = decoder.forward(IDS[:1, done - count : done])
        assert found.shape[1] == count
        assert near(found, whole(model, IDS[:1, :done])[:, -count:])
        assert decoder.length == done


def test_the_border_is_that_of_the_longest_text_of_a_batch(opened: Opened) -> None:
    """Padding is no part of a text: with 5 of it in one and 3 in the other, the border comes 3 tokens later."""
    model, folder, session = opened
    mask = np.ones_like(IDS)
    mask[0, :5] = mask[1, :3] = 0
    decoder = Decoder(folder, session, batch=2)
    decoder.forward(IDS[:, : BORDER - 2], mask[:, : BORDER - 2])
    for done in range(BORDER - 1, BORDER + 8):
        found = decoder.forward(IDS[:, done - 1 : done], mask[:, done - 1 : done])
        assert near(found, whole(model, IDS[:, :done], mask[:, :done])[:, -1:])


def test_greedy_text_over_the_border(opened: Opened) -> None:
    """Of Phi-3 transformers makes the cache anew as well; of others its logits of the whole text say what is right."""
    model, folder, session = opened
    prompt = IDS[:1, :16]
    found = list(generate(Decoder(folder, session), prompt, Sampling(END - 16)))
    ids = prompt
    for token in found:
        assert token == whole(model, ids)[0, -1].argmax()
        ids = np.concatenate([ids, [[token]]], axis=1)
    if model.config.model_type == "phi3":
        own = model.generate(torch.from_numpy(prompt), max_new_tokens=END - 16, do_sample=False, eos_token_id=None)
        assert found == own[0, 16:].tolist()[: len(found)]


def test_a_restored_cache_of_a_short_text_does_not_go_over_the_border(opened: Opened) -> None:
    model, folder, session = opened
    decoder, again = Decoder(folder, session), Decoder(folder, session)
    decoder.forward(IDS[:1, : BORDER - 1])
    again.restore(decoder.cache(), np.ones((1, BORDER - 1), np.int64))
    assert near(again.forward(IDS[:1, BORDER - 1 : BORDER]), whole(model, IDS[:1, :BORDER])[:, -1:])
    with pytest.raises(InputError, match="a restored cache ends before 32 tokens"):
        again.forward(IDS[:1, BORDER : BORDER + 1])
    decoder.forward(IDS[:1, BORDER - 1 : BORDER + 3])
    again.restore(decoder.cache(), np.ones((1, BORDER + 3), np.int64))
    found = again.forward(IDS[:1, BORDER + 3 : BORDER + 5])
    assert near(found, whole(model, IDS[:1, : BORDER + 5])[:, -2:])


def test_other_runners_are_told(opened: Opened) -> None:
    _, folder, _ = opened
    description = json.loads((folder.folder / "kurtail_export.json").read_text())
    assert description["longrope"]["border"] == BORDER
    assert "make its cache anew" in description["longrope"]["where"]


def test_genai_ends_at_the_border(
    make_family: Callable[..., Path], make_artefact: Callable[..., Path], exported: Path, tmp_path: Path
) -> None:
    """It keeps its cache whatever the text's length."""
    artefact = make_artefact(make_family("phi3"), **FLOAT)
    folder = export(artefact, tmp_path / "onnx", ONNX(kv="float"), check=False)
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == BORDER
    assert json.loads((folder / "kurtail_export.json").read_text())["model"]["positions"] == 256
    assert json.loads((exported / "kurtail_export.json").read_text())["longrope"] is None
