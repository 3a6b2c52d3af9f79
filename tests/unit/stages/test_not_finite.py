"""Weights that are no numbers, values too large for float16 or for float32: kept as they are, or refused by name."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards import tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from walks import perplexity_of

import kurtail_pl
from kurtail_pl.errors import CheckpointError, NotFinite
from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.surgery.rotations import Rotations

pytestmark = pytest.mark.usefixtures("cache")

EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


def changed(tiny: Path, folder: Path, change: Change) -> Path:
    """A copy of the tiny model with other weights."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scaled(name: str, factor: float) -> Change:
    return lambda tensors: tensors[name].mul_(factor)


@pytest.fixture(params=[(EMBEDDING, (299, 5)), (DOWN, (0, 0)), ("model.norm.weight", 47)], ids=lambda p: p[0])
def damaged(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> tuple[Path, str]:
    """A model with one weight that is no number, and the weight's name; no text holds the embedding's token."""
    name, place = request.param
    return changed(tiny, tmp_path / "model", lambda t: t[name].__setitem__(place, math.nan)), name


@pytest.mark.parametrize("stage", ["capture", "evaluate", "fuse"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    damaged: tuple[Path, str], rotations: Rotations, text: TextSpec, tmp_path: Path, stage: str
) -> None:
    model, name = damaged
    out = tmp_path / "out"
    stages: dict[str, Callable[[], object]] = {
        "capture": lambda: capture(CaptureSpec(str(model), text, rows=50), out),
        "evaluate": lambda: perplexity(Checkpoint(model), text),
        "fuse": lambda: fuse(Checkpoint(model), rotations, "quarot", out),
    }
    if stage == "capture" and name == "model.norm.weight":
        return  # It reads no more than its sites need.
    with pytest.raises(CheckpointError, match=re.escape(name)) as refused:
        stages[stage]()
    assert str(model / "model.safetensors") in str(refused.value)
    assert not out.exists()


@pytest.mark.parametrize("method", ["none", "quarot"])
@pytest.mark.parametrize("factor", [3e5, 1e-7])
def test_an_artefact_of_embeddings_out_of_float16s_range_is_the_model(
    tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path, method: str, factor: float
) -> None:
    """Biases bring the states of tiny embeddings to a usual size; the head, made as small, makes all logits small."""
    model = changed(tiny, tmp_path / "model", scaled(EMBEDDING, factor))
    chosen = Rotations() if method == "none" else rotations
    fused = fuse(Checkpoint(model), chosen, method, tmp_path / "fused")
    artefact = quantize(fused, QuantizeSpec(FLOAT, RTN(), text=text), tmp_path / "artefact")
    with torch.no_grad():
        ids = torch.arange(40)[None]
        wanted = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        found = kurtail_pl.load(artefact)(ids).logits
    # What float16 takes from all other weights moves the logits by less than the embedding's loss would.
    assert (found - wanted).abs().max() < 4e-3 * wanted.abs().max()
    assert tensors_of(artefact)[EMBEDDING].dtype == torch.float32
    assert tensors_of(artefact)["lm_head.weight"].dtype == torch.float16
    source = AutoModelForCausalLM.from_pretrained(model)
    reference = perplexity_of(source, Checkpoint(model).tokenizer(), Path(text.source), 6, 48)
    assert perplexity(Checkpoint(artefact), text)["perplexity"] == pytest.approx(reference, rel=1e-2)


def test_an_artefact_of_ordinary_weights_is_in_float16(artefact: Path) -> None:
    floats = {n: t.dtype for n, t in tensors_of(artefact).items() if t.is_floating_point() and not n.endswith("scale")}
    assert set(floats.values()) == {torch.float16}


def test_states_beyond_float32_are_refused_where_they_are_made(
    tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path
) -> None:
    """The third layer's MLP brings 1e37 times what it did, and the last one that again."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name in ("up_proj", "down_proj"):
            for part in ("weight", "bias"):
                tensors[f"model.layers.2.mlp.{name}.{part}"] *= 1e19

    model = changed(tiny, tmp_path / "model", enlarge)
    with pytest.raises(NotFinite, match=r"decoder layer 2\b"):
        perplexity(Checkpoint(model), text)
    with pytest.raises(NotFinite, match=r"decoder layer 2\b"):
        capture(CaptureSpec(str(model), text, rows=50), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_perplexity_that_is_infinite_is_an_error(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    model = changed(tiny, tmp_path / "model", scaled("lm_head.weight", 1e4))
    with pytest.raises(NotFinite, match="perplexity is inf"):
        perplexity(Checkpoint(model), text)


def test_a_fused_model_is_looked_at_as_any_other(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    """A card that vouches for weights which are no numbers vouches for nothing: they are looked at all the same."""
    copy = Path(shutil.copytree(fused, tmp_path / "fused"))
    path = next(p for p in sorted(copy.glob("model*.safetensors")) if DOWN in load_file(p))
    tensors = load_file(path)
    tensors[DOWN][3] = math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    card = json.loads((copy / "kurtail.json").read_text())
    card["sha256"][path.name] = sha256_of(path)
    (copy / "kurtail.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=re.escape(DOWN)):
        quantize(copy, replace(QuantizeSpec(text=text), rounder=RTN()), tmp_path / "artefact")
    assert not (tmp_path / "artefact").exists()
