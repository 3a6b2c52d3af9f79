"""Folders of ours where a plain model is wanted, by our commands or by transformers alone: refused, or right."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_family
from logits import IDS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.cli import verbs
from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.mark import is_marked
from kurtail_pl.storage.sources import config_of, open_any, open_model
from kurtail_pl.surgery.rotations import Rotations, random_rotations

DOORS = """
import sys
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

folder = Path(sys.argv[1])
doors = [
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    LlamaForCausalLM.from_pretrained,
    lambda folder: LlamaForCausalLM.from_pretrained(folder, use_safetensors=False),
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu"),
    lambda folder: pipeline("text-generation", model=str(folder)),
    lambda folder: AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
]
for door in doors:
    try:
        door(folder)
    except ValueError as error:
        assert "import kurtail_pl before, or load it with kurtail_pl.load" in str(error), error
    else:
        sys.exit(f"door {doors.index(door)} is open")
assert "kurtail_pl" not in sys.modules
"""


@pytest.fixture(params=["fused", "artefact"])
def folder(request: pytest.FixtureRequest) -> Path:
    """With online rotations, and quantized."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_transformers_alone_refuses_and_says_what_to_do(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DOORS, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_without_online_rotations_is_marked_once_quantized(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    plain = fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "fused")
    rounded = quantize(plain, QuantizeSpec(rounder=RTN(), text=text), tmp_path / "rounded")
    halved = quantize(plain, QuantizeSpec(FLOAT, RTN(), text=text), tmp_path / "halved")
    marked = [is_marked(json.loads((folder / "config.json").read_text())) for folder in (plain, rounded, halved)]
    assert marked == [False, True, False]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(halved, dtype=torch.float32)(IDS).logits
        assert torch.equal(logits, kurtail_pl.load(halved)(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotated", [False, True])
def test_a_model_without_online_rotations_is_plain(family: str, rotated: bool, tiny: Path, tmp_path: Path) -> None:
    """What is fused into the weights is right wherever they are read."""
    source = tmp_path / "model"
    tiny_family(family).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(source)
    found = random_rotations(AutoConfig.from_pretrained(source), 0)
    rotations = Rotations(found.residual, found.value) if rotated else Rotations()
    folder = fuse(Checkpoint(source), rotations, "quarot" if rotated else "none", tmp_path / "fused")
    with torch.no_grad():
        wanted, alone = (AutoModelForCausalLM.from_pretrained(f)(IDS).logits for f in (source, folder))
        ours = kurtail_pl.load(folder)(IDS).logits
    assert ((alone - wanted).abs().max() / wanted.abs().max()).item() < 1e-4
    assert ((ours - alone).abs().max() / wanted.abs().max()).item() < 1e-5


def test_the_configuration_is_the_original_one(tiny: Path, folder: Path) -> None:
    """Behind the mark; the tokenizer, too, which transformers chooses by the configuration."""
    wanted, found = AutoConfig.from_pretrained(tiny).to_dict(), Checkpoint(folder).config.to_dict()
    assert found == {**wanted, "dtype": found["dtype"], "_name_or_path": found["_name_or_path"]}
    assert found["dtype"] in (torch.float32, "float32")
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (tiny, folder)]
    assert type(tokenizers[0]) is type(tokenizers[1])
    assert tokenizers[0].backend_tokenizer.to_str() == tokenizers[1].backend_tokenizer.to_str()


def test_a_plain_model_is_wanted(folder: Path, text: TextSpec, tmp_path: Path) -> None:
    kind = "a fused model" if folder.name == "fused" else "a quantized artefact"
    doors: list[Callable[[], object]] = [
        lambda: open_model(str(folder)),
        lambda: config_of(str(folder)),
        lambda: verbs.fuse(str(folder), tmp_path / "again", method="quarot"),
        lambda: fuse(Checkpoint(folder), Rotations(), "none", tmp_path / "again"),
        lambda: capture(CaptureSpec(str(folder), text, rows=8), tmp_path / "store"),
    ]
    for door in doors:
        with pytest.raises(ArtefactError, match=rf"is {kind} .*a plain model is wanted.*\(tiny\)") as error:
            door()
        assert len(str(error.value)) <= 300
    assert not list(tmp_path.iterdir())


def test_without_its_card_a_folder_is_refused_everywhere(folder: Path, text: TextSpec, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "kurtail.json").unlink()
    doors: list[Callable[[], object]] = [
        lambda: open_model(str(copy)),
        lambda: open_any(str(copy)),
        lambda: config_of(str(copy)),
        lambda: Checkpoint(copy),
        lambda: verbs.evaluate(text, model=str(copy)),
        lambda: kurtail_pl.load(copy),
    ]
    for door in doors:
        with pytest.raises(ArtefactError, match=r"kurtail.json") as error:
            door()
        assert len(str(error.value)) <= 300


def test_a_copied_configuration_alone_is_known_by_its_mark(fused: Path, tmp_path: Path) -> None:
    """As it comes from the hub, where `plan` reads nothing else."""
    (tmp_path / "config.json").write_bytes((fused / "config.json").read_bytes())
    with pytest.raises(ArtefactError, match=r"was fused or quantized by kurtail"):
        config_of(str(tmp_path))


def test_an_artefact_is_not_quantized_again(artefact: Path, text: TextSpec, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"is quantized already; give the folder that kurtail fuse wrote"):
        quantize(artefact, QuantizeSpec(rounder=RTN(), text=text), tmp_path / "again")


def test_folders_of_ours_are_evaluated_by_path_and_from_home(
    folder: Path, text: TextSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    wanted = perplexity(Checkpoint(folder), text)["perplexity"]
    for name in (str(folder), f"~/{folder.name}"):
        verbs.evaluate(replace(text), model=name)
        assert capsys.readouterr().out.startswith(f"perplexity {wanted:.4f} ")


def test_a_folder_of_before_the_mark_is_still_read(artefact: Path, text: TextSpec, tmp_path: Path) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    assert settings.pop("quantization_config") == {"quant_method": "kurtail"}
    del settings["transformers_weights"]
    (copy / "config.json").write_text(json.dumps(settings))
    card = json.loads((copy / "kurtail.json").read_text())
    card["sha256"]["config.json"] = sha256_of(copy / "config.json")
    (copy / "kurtail.json").write_text(json.dumps(card))
    wanted = perplexity(Checkpoint(artefact), text)["perplexity"]
    assert perplexity(Checkpoint(copy), text)["perplexity"] == wanted
