"""`load` with what users hand it: types, devices, maps, names; and what `save_pretrained` of its models writes."""

import copy
import filecmp
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from logits import IDS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import kurtail_pl
from kurtail_pl.errors import ArtefactError, CheckpointError, ConfigError
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import Compute
from kurtail_pl.surgery.rotations import Rotations

HALVES = [torch.bfloat16, torch.float16]


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_loses_no_more_than_in_transformers(tiny: Path, fused: Path, dtype: torch.dtype) -> None:
    """A fused model computes the original's function: rounded alike, it is as far from it in float32."""
    exact = logits_of(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    plain = logits_of(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype))
    model = kurtail_pl.load(fused, dtype=dtype)
    assert model.dtype == model.config.dtype == logits_of(model).dtype == dtype
    assert error(logits_of(model), exact) < 2 * error(plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_only_what_may_be_rounded_is(artefact: Path, dtype: torch.dtype) -> None:
    model = kurtail_pl.load(artefact, dtype=str(dtype).removeprefix("torch."))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = name.rpartition(".")[2]
        wanted = {"codes": torch.uint8, "scale": torch.float32, "left": torch.float64, "right": torch.float64}
        wanted |= {"rows": torch.int8, "columns": torch.int8}
        assert tensor.dtype == (torch.float32 if "inv_freq" in kind else wanted.get(kind, dtype)), name
    assert torch.equal(logits_of(model), logits_of(kurtail_pl.load(artefact).to(dtype)))


def test_bfloat16_is_what_is_evaluated_in_bfloat16(artefact: Path, text: TextSpec) -> None:
    content = Path(text.source).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(artefact)(content, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 6 * 48]).view(6, 48)
    model = kurtail_pl.load(artefact, dtype=torch.bfloat16)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:], reduction="sum")
            for window in windows
        ]
    measured = perplexity(Checkpoint(artefact), text, Compute("cpu", "bfloat16"))
    assert measured["perplexity"] == pytest.approx(
        (torch.stack(losses).double().sum() / (6 * 47)).exp().item(), rel=1e-6
    )


def test_a_type_that_does_not_hold_the_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight.data[5, 3] = 7e4
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "large")
    folder = fuse(Checkpoint(tmp_path / "large"), Rotations(), "none", tmp_path / "fused")
    with pytest.raises(
        ConfigError, match=r"float16, and lm_head.weight is beyond its range; choose bfloat16 or float32"
    ):
        kurtail_pl.load(folder, dtype="float16")
    assert torch.isfinite(logits_of(kurtail_pl.load(folder, dtype="bfloat16"))).all()


WHOLE = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"device": torch.device("cpu"), "dtype": torch.float32},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": torch.device("cpu")}},
        {"device_map": {**WHOLE, "lm_head": "cpu"}, "dtype": "float32"},
    ],
)
def test_where_a_model_goes_does_not_change_it(artefact: Path, options: dict[str, Any]) -> None:
    assert torch.equal(logits_of(kurtail_pl.load(artefact, **options)), logits_of(kurtail_pl.load(artefact)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "auto"}, r"dtype is 'auto'; choose float32, bfloat16, float16"),
        ({"dtype": torch.float64}, r"dtype is torch.float64; choose"),
        ({"dtype": torch.int8}, r"dtype is torch.int8; choose"),
        ({"device": "gpu"}, r"device is 'gpu', and torch has none here .*; choose cpu"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', and torch has none here"),
        ({"device": "cpu", "device_map": "auto"}, r"device is 'cpu' and device_map is 'auto'; give one of them"),
        ({"device_map": "balanced"}, r"device is 'balanced', and torch has none here"),
        ({"device_map": WHOLE}, r"device_map cannot be used here .*lm_head"),
        ({"device_map": {}}, r"device_map cannot be used here"),
        ({"device_map": {**WHOLE, "lm_head": "disk"}}, r"device_map puts parts on cpu and disk"),
        ({"device_map": {**WHOLE, "lm_head": 0}}, r"device_map puts parts on 0 and cpu"),
        ({"device_map": {"": "gpu"}}, r"device_map cannot be used here"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(artefact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kurtail_pl.load(artefact, **options)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


def test_names_from_home_and_on_the_hub(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as a download leaves it: links to files that have their hashes for names."""
    wanted = logits_of(kurtail_pl.load(artefact))
    monkeypatch.setenv("HOME", str(artefact.parent))
    assert torch.equal(logits_of(kurtail_pl.load(f"~/{artefact.name}")), wanted)
    assert torch.equal(logits_of(kurtail_pl.load(Path(f"~/{artefact.name}"))), wanted)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"model 'someone/artefact' is not a folder here"):
        kurtail_pl.load("someone/artefact")
    repository, commit = tmp_path / "hub" / "models--someone--artefact", "0" * 40
    snapshot = repository / "snapshots" / commit
    for part in (snapshot, repository / "refs", repository / "blobs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(artefact.iterdir())):
        (repository / "blobs" / f"{number}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(repository / "blobs" / f"{number}", snapshot))
    model = kurtail_pl.load("someone/artefact")
    assert torch.equal(logits_of(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert not any(path.is_symlink() for path in (tmp_path / "saved").iterdir())
    assert torch.equal(logits_of(kurtail_pl.load(tmp_path / "saved")), wanted)


def test_a_loaded_model_serves_a_pipeline(artefact: Path) -> None:
    """The same tokens as `generate` gives, two texts of different lengths in a batch, padded on the left."""
    model, tokenizer = kurtail_pl.load(artefact), AutoTokenizer.from_pretrained(artefact, padding_side="left")
    texts, settings = ["The old king found", "A dragon"], {"do_sample": False, "max_new_tokens": 6}
    serve = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = [found[0]["generated_text"] for found in serve(texts, batch_size=2, **settings)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for answer, ids in zip(answers, model.generate(**batch, **settings), strict=True):
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(params=["fused", "artefact"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_saved_model_is_its_folder(folder: Path, dtype: str, copied: bool, tmp_path: Path) -> None:
    model = kurtail_pl.load(folder, dtype=dtype)
    if copied:
        model = copy.deepcopy(model)
    model.save_pretrained(str(tmp_path / "saved"), max_shard_size="1GB")
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names
    assert filecmp.cmpfiles(folder, tmp_path / "saved", names, shallow=False)[0] == names
    assert torch.equal(logits_of(kurtail_pl.load(tmp_path / "saved", dtype=dtype)), logits_of(model))
    AutoTokenizer.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved")
    kurtail_pl.load(tmp_path / "saved").save_pretrained(tmp_path / "saved")


def wider_clip(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.cache = None


def other_scale(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.scale[3] *= 1.01


def other_norm(model: PreTrainedModel) -> None:
    model.model.norm.weight += 0.001


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    r"model.layers.1.self_attn": wider_clip,
    r"model.layers.1.mlp.up_proj.scale": other_scale,
    r"model.norm.weight": other_norm,
    r"model.embed_tokens.weight": lambda model: model.to(torch.float16).to(torch.bfloat16).float(),
    r"model.layers.0.self_attn.q_proj": lambda model: model.model.layers[0].self_attn.q_proj.unpack(),
    r"model.extra": lambda model: model.model.add_module("extra", torch.nn.Identity()),
}


@pytest.mark.parametrize("where", CHANGES)
def test_a_changed_model_is_not_saved(artefact: Path, tmp_path: Path, where: str) -> None:
    """Not as what it was, which would be silent, nor as what nothing reads."""
    model = kurtail_pl.load(artefact)
    with torch.no_grad():
        CHANGES[where](model)
    with pytest.raises(ArtefactError, match=rf"{where} is not what .* holds, and only an unchanged model can be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_where_a_model_is_not_saved(artefact: Path, tmp_path: Path) -> None:
    model = kurtail_pl.load(artefact)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"is not empty; name a new folder"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"is not empty; name a new folder"):
        model.save_pretrained(tmp_path / "notes.txt")
    for options in ({"push_to_hub": True}, {"state_dict": model.state_dict()}):
        with pytest.raises(ArtefactError, match=r"copies the model's folder"):
            model.save_pretrained(tmp_path / "saved", **options)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_whose_folder_is_gone_is_not_saved(artefact: Path, tmp_path: Path) -> None:
    kurtail_pl.load(artefact).save_pretrained(tmp_path / "first")
    model = kurtail_pl.load(tmp_path / "first")
    card = json.loads((tmp_path / "first" / "kurtail.json").read_text())
    (tmp_path / "first" / next(iter(card["sha256"]))).unlink()
    with pytest.raises(ArtefactError, match=r"is missing"):
        model.save_pretrained(tmp_path / "second")
