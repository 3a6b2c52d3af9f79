"""Artefacts loaded back: the evaluated logits, generation, damage."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from logits import IDS
from schemes import SCHEMES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from walks import embed, windows_of

import kurtail_pl
from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.errors import ArtefactError, ConfigError, KurtailError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import RTN, PerTokenHead, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.card import read_card, write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.joining import join
from kurtail_pl.streaming.walker import Walker


def nll(logits: Tensor, ids: Tensor) -> float:
    """Negative log-likelihood of all tokens but the first, float64."""
    scores = logits.double().log_softmax(-1)[:-1]
    return -scores[torch.arange(len(ids) - 1), ids[1:]].sum().item()


@torch.no_grad()
def walked(folder: Path, windows: Tensor) -> list[Tensor]:
    """Logits as evaluation computes them, one layer at a time."""
    checkpoint = Checkpoint(folder)
    walker = Walker(checkpoint, skeleton(checkpoint))
    hidden = embed(walker, windows)
    for _, layer in walker.layers("test"):
        hidden = [walker.advance(layer, h) for h in hidden]
    norm, head = walker.head()
    return [head(norm(h))[0] for h in hidden]


@pytest.fixture(params=["w4a4kv4", *SCHEMES])
def folder(request: pytest.FixtureRequest, artefact: Path, fused: Path, text: TextSpec, tmp_path: Path) -> Path:
    """Artefacts of several schemes."""
    if request.param == "w4a4kv4":
        return artefact
    return quantize(fused, QuantizeSpec(SCHEMES[request.param], RTN(), text=text), tmp_path / "artefact")


def test_loaded_logits_are_those_evaluated(folder: Path, text: TextSpec) -> None:
    windows = windows_of(folder, text)
    model = kurtail_pl.load(folder)
    assert not model.training
    total = 0.0
    for window, expected in zip(windows, walked(folder, windows), strict=True):
        with torch.no_grad():
            logits = model(window.unsqueeze(0)).logits[0]
        assert logits.dtype == torch.float32
        assert torch.equal(logits, expected)
        # cross_entropy in float32, a window at a time, summed in float64.
        total += torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").double().item()
    measured = perplexity(Checkpoint(folder), text)
    assert measured["perplexity"] == pytest.approx(math.exp(total / measured["tokens"]), rel=1e-12)
    exact = sum(nll(a, b) for a, b in zip(walked(folder, windows), windows, strict=True))
    assert measured["perplexity"] == pytest.approx(math.exp(exact / (6 * 47)), rel=1e-6)


def test_quantizing_changes_the_logits_but_not_beyond_recognition(
    tiny: Path, artefact: Path, text: TextSpec, tmp_path: Path, fused: Path
) -> None:
    windows = windows_of(tiny, text)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny)(windows).logits
        four = kurtail_pl.load(artefact)(windows).logits
        eight_bits = Quantizer(8, False)
        scheme = Scheme(Uniform(8), Quantizer(8), PerTokenHead(eight_bits, eight_bits))
        eight = kurtail_pl.load(quantize(fused, QuantizeSpec(scheme, RTN()), tmp_path / "w8"))(windows).logits
    error = {n: ((v - plain).norm() / plain.norm()).item() for n, v in (("four", four), ("eight", eight))}
    assert 0 < error["eight"] < 0.1
    assert error["eight"] < error["four"] / 4
    assert error["four"] < 1


def test_generation_with_cache_equals_generation_without(artefact: Path) -> None:
    """In float64, so that no code sits on the edge between two roundings."""
    model = kurtail_pl.load(artefact).double()
    tokenizer = AutoTokenizer.from_pretrained(artefact, padding_side="left")
    batch = tokenizer(["The old king found", "A dragon"], return_tensors="pt", padding=True)
    assert 0 in batch["attention_mask"]
    settings = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    cached, uncached = (
        model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=use_cache, **settings
        )
        for use_cache in (True, False)
    )
    assert cached.shape == (2, batch["input_ids"].shape[1] + 10)
    assert torch.equal(cached, uncached)
    assert len(set(cached[0, -10:].tolist())) > 1


def test_packed_weights_stay_packed_in_memory(artefact: Path) -> None:
    model = kurtail_pl.load(artefact)
    for layer in model.model.layers:
        assert layer.mlp.up_proj.codes.dtype == torch.uint8
        assert layer.mlp.up_proj.codes.shape == (172, 24)
        assert layer.mlp.up_proj.weight is None
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.device.type == "meta" for t in model.state_dict().values())


def test_tokenizer_loads_from_the_folder(tiny: Path, artefact: Path) -> None:
    text = "The old king found a größer dragon."
    for special in (True, False):
        ids = [
            AutoTokenizer.from_pretrained(f)(text, add_special_tokens=special)["input_ids"] for f in (tiny, artefact)
        ]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["model.safetensors", "rotations.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "byte"])
def test_a_damaged_folder_is_refused(artefact: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).unlink()
    if damage == "byte":
        (copy / name).write_bytes(data)
    with pytest.raises(ArtefactError, match=rf"{name} is {'missing' if damage == 'gone' else 'damaged'}"):
        kurtail_pl.load(copy)


def test_folders_that_are_not_ours_are_refused(tiny: Path, artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    (copy / "kurtail.json").unlink()
    for folder, said in ((copy, "is no finished folder of kurtail's"), (tmp_path / "none", "does not exist")):
        with pytest.raises(
            ArtefactError, match=rf"{folder.name} {said}.*; name one that kurtail fit, fuse or quantize"
        ):
            kurtail_pl.load(folder)
    with pytest.raises(ArtefactError, match=rf"{tiny.name} is no finished folder"):
        kurtail_pl.load(tiny)
    (copy / "kurtail.json").write_text("{")
    with pytest.raises(KurtailError, match=r"kurtail.json is not JSON"):
        kurtail_pl.load(str(copy))


def test_weights_in_numbered_files_are_the_same(artefact: Path, tmp_path: Path) -> None:
    """As of a model of more than 5 GB."""
    copy = shutil.copytree(artefact, tmp_path / "copy")
    (copy / "model.safetensors").rename(tmp_path / "part")
    join([tmp_path / "part"], copy, largest=50_000)
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    write_card(copy, {name: value for name, value in read_card(copy).items() if name not in ("format", "sha256")})
    wanted = kurtail_pl.load(artefact)
    for model in (kurtail_pl.load(copy), AutoModelForCausalLM.from_pretrained(copy)):
        assert model.state_dict().keys() == wanted.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in wanted.state_dict().items())


def test_another_attention_is_refused(artefact: Path) -> None:
    """transformers would go on without rotated keys and quantized caches."""
    model = kurtail_pl.load(artefact)
    before = model(IDS).logits
    for name in ("eager", "sdpa", {"": "flash_attention_2"}):
        with pytest.raises(ConfigError, match=r"attn_implementation is .*leave it as it is"):
            model.set_attn_implementation(name)
    model.set_attn_implementation("kurtail")
    assert torch.equal(model(IDS).logits, before)
