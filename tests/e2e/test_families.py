"""The whole road for every family, by the real command: capture, fit, fuse, GPTQ, evaluation, load, generation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, re_expressed, tiny_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from walks import perplexity_of

import kurtail_pl
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import CacheFormat
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.linear import QuantizedLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
Kurtail = Callable[..., None]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_road(
    name: str, kurtail: Kurtail, write_recipe: Callable[[Path, Path], str], tied: Path, text_file: Path, tmp_path: Path
) -> None:
    """Perplexity comes from the walker, layer by layer; the loaded model is transformers' own forward."""
    model = tmp_path / "model"
    tiny_family(name).save_pretrained(model)
    AutoTokenizer.from_pretrained(tied).save_pretrained(model)
    (tmp_path / "recipe.yaml").write_text(write_recipe(model, text_file))
    kurtail(tmp_path, "fit", "--config", "recipe.yaml")
    folder = tmp_path / "artifacts" / "model-kurtail-w4a4kv4"
    results, card = (json.loads((folder / f"{file}.json").read_text()) for file in ("results", "kurtail"))
    assert card["gate"]["float64"] < 1e-8
    assert card["gate"]["float32"] < 1e-4
    loaded, tokenizer = kurtail_pl.load(folder), AutoTokenizer.from_pretrained(folder)
    linears = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) >= 4 * loaded.config.num_hidden_layers
    assert all(linear.weight is None for linear in linears)
    own = perplexity_of(loaded, tokenizer, text_file, 2, 128)
    assert results["evaluation"]["perplexity"] == pytest.approx(own, rel=1e-5)
    prompt = tokenizer("the old king", return_tensors="pt", return_token_type_ids=False)
    generated = loaded.generate(**prompt, max_new_tokens=6, do_sample=False)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        assert generated[0, length] == loaded(**prompt).logits[0, -1].argmax()


def test_the_road_with_an_r2_for_each_head(
    kurtail: Kurtail, write_recipe: Callable[[Path, Path], str], tied: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(write_recipe(tied, text_file))
    kurtail(tmp_path, "fit", "--config", "recipe.yaml", "--model.init_args.value_per_head", "true")
    folder = tmp_path / "artifacts" / f"{tied.name}-kurtail-w4a4kv4"
    value = load_file(folder / "rotations.safetensors")["value"]
    assert value.shape == (4, 2, 16, 16)
    identity = torch.eye(16, dtype=value.dtype).expand_as(value)
    assert torch.allclose(value.mT @ value, identity, atol=1e-10)
    assert not torch.allclose(value[:, 0], value[:, 1], atol=0.1)
    assert card_of(folder)["gate"]["float64"] < 1e-8
    own = perplexity_of(kurtail_pl.load(folder), AutoTokenizer.from_pretrained(folder), text_file, 2, 128)
    assert json.loads((folder / "results.json").read_text())["evaluation"]["perplexity"] == pytest.approx(own, rel=1e-5)


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "kurtail.json").read_text())
    return card


def made_by(kurtail: Kurtail, place: Path, model: Path, text: Path, method: str) -> Path:
    """Random rotations of one seed, weights by a method, everything in 4 bits."""
    fused, folder = place / "fused", place / f"{model.name}-{method}"
    kurtail(place, "fuse", "--model", model, "--method", "quarot", "--out", fused, "--overwrite")
    text_options = ["--spec.text.source", text, "--spec.text.windows", 4, "--spec.text.seqlen", 128]
    options = ["--spec.rounder", method.upper(), *text_options]
    kurtail(place, "quantize", "--artefact", fused, "--out", folder, *options)
    return folder


@pytest.mark.parametrize("layout", ["phi3", "qwen2", "mixtral"])
def test_re_expressed_stories_have_the_llamas_perplexity(
    layout: str, stories: Path, kurtail: Kurtail, text_file: Path, tmp_path: Path
) -> None:
    """Same rotations, same rounding: fused projections and biases of zero give the same codes of weights.

    Activations on a border are rounded otherwise where sums have another order, and move what comes after them: with
    their quantizers on, perplexities may differ by a part of what all the rounding does.
    """
    model = tmp_path / layout
    re_expressed(stories, layout).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.save_pretrained(model)
    made = [kurtail_pl.load(made_by(kurtail, tmp_path, path, text_file, "rtn")) for path in (stories, model)]
    original = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    exact, *found = (perplexity_of(each, tokenizer, text_file, 4, 128) for each in (original, *made))
    assert abs(found[0] / exact - 1) > 1e-3
    assert abs(found[1] - found[0]) < 0.5 * abs(found[0] - exact)
    for each in made:
        for module in each.modules():
            for part in ("activations", "cache"):
                if isinstance(getattr(module, part, None), Quantizer | CacheFormat):
                    setattr(module, part, None)
    rounded = [perplexity_of(each, tokenizer, text_file, 4, 128) for each in made]
    assert abs(rounded[0] / exact - 1) > 1e-3
    assert rounded[1] == pytest.approx(rounded[0], rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phi3", "glm4_moe", "gpt_oss", "apertus"])
def test_a_copied_model_is_transformers_own(name: str, kurtail: Kurtail, tied: Path, tmp_path: Path) -> None:
    """Names and stacking on disk are the hub's, both ways: transformers reads back every tensor as it was."""
    model = tiny_family(name)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    kurtail(tmp_path, "fuse", "--model", tmp_path / "model", "--method", "none", "--out", tmp_path / "copy")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32).state_dict()
    assert set(copied) == set(model.state_dict())
    assert [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, copied[key])] == []


def test_an_expert_with_few_tokens_borrows_and_is_named(
    kurtail: Kurtail, tied: Path, text_file: Path, tmp_path: Path
) -> None:
    """Expert 4 of layer 1 is never chosen: of four logits a, -a, b, -b two are above its zero."""
    mixture = tiny_family("mixtral", num_local_experts=5)
    router = mixture.model.layers[1].mlp.gate.weight
    router.copy_(torch.stack([router[0], -router[0], router[1], -router[1], torch.zeros_like(router[0])]))
    mixture.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "model")
    gptq = made_by(kurtail, tmp_path, tmp_path / "model", text_file, "gptq")
    tokens = [card_of(gptq)["expert_tokens"][f"model.layers.1.mlp.experts.{number}"] for number in range(5)]
    assert sum(tokens) == 2 * 4 * 128
    assert tokens[4] == 0
    few = {name for name, count in card_of(gptq)["expert_tokens"].items() if count < 60}
    assert set(card_of(gptq)["borrowers"]) == few
    rtn = made_by(kurtail, tmp_path, tmp_path / "model", text_file, "rtn")
    assert card_of(rtn)["expert_tokens"] == {}
    store = tmp_path / "store"
    capture = ["--spec.model", tmp_path / "model", "--spec.text.source", text_file, "--out", store]
    kurtail(tmp_path, "capture", *capture, "--spec.text.windows", 4, "--spec.text.seqlen", 64, "--spec.rows", 200)
    measure = ["--text.source", text_file, "--text.windows", 2, "--text.seqlen", 64, "--validation_rows", 50]
    kurtail(tmp_path, "eval", "--model", gptq, "--store", store, *measure)
    kurtail(tmp_path, "report", "--artefact", gptq)
    assert "`model.layers.1.mlp.experts.4`: 0 calibration tokens" in (gptq / "report.md").read_text()
    name = "model.layers.1.block_sparse_moe.experts.4.w2.codes"
    codes = [Checkpoint(folder).tensor(name) for folder in (gptq, rtn)]
    assert not torch.equal(*codes)  # GPTQ, on borrowed tokens, not RTN
    assert all(torch.isfinite(kurtail_pl.load(folder)(torch.arange(9)[None]).logits).all() for folder in (gptq, rtn))
