"""The verbs of the GGUF export on the real stories260k, and llama.cpp's own continuations of its texts."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from ggufs import without_online
from kurtail_gguf.families import family_of
from kurtail_gguf.verify.file import Written
from kurtail_gguf.verify.mirror import float_model, round_inputs
from kurtail_gguf.verify.runtime import Runtime, import_runtime
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import kurtail_pl
from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.checkpoint import Checkpoint

Kurtail = Callable[..., None]
WIDTH = 192
"""Of its MLP, 172 before: channels that are zero change nothing, and GGUF's blocks divide it."""
PROMPTS = ("Once upon a time, there was", "One day, a little girl", "Tom had a red ball and", "The dog ran to")


def widened(stories: Path, folder: Path) -> Path:
    """stories260k with channels of zeros in its MLPs."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    more = WIDTH - model.config.intermediate_size
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            state[name] = pad(tensor, (0, 0, 0, more))
        elif name.endswith("down_proj.weight"):
            state[name] = pad(tensor, (0, more))
    model.config.intermediate_size = WIDTH
    wide = LlamaForCausalLM(model.config)
    wide.load_state_dict(state)
    wide.tie_weights()
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(stories: Path, kurtail: Kurtail, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artefact ``story`` and its export ``gguf``."""
    place = tmp_path_factory.mktemp("gguf")
    checkpoint = Checkpoint(widened(stories, place / "model"))
    fuse(checkpoint, without_online(checkpoint), "quarot", place / "fused")
    scales = ("--spec.scheme.weights.scales", "float16", "--spec.scheme.weights.group_size", 32)
    kurtail(place, "quantize", "--artefact", "fused", "--spec.rounder", "RTN", *scales, "--out", "story")
    kurtail(place, "export", "--artefact", "story", "--out", "gguf", "--to", "gguf")
    return place


def test_the_file_is_the_artefact(place: Path) -> None:
    """By the reader and the dequantizers of the package gguf; rows of down_proj are in one order everywhere."""
    stored = {tensor.name: tensor for tensor in GGUFReader(place / "gguf" / "model.gguf").tensors}
    model = kurtail_pl.load(place / "story")
    assert len([name for name in stored if "ffn_down" in name]) == len(model.model.layers) == 5
    for index, layer in enumerate(model.model.layers):
        tensor = stored[f"blk.{index}.ffn_down.weight"]
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(found, layer.mlp.down_proj.dense_weight())
    checks = json.loads((place / "gguf" / "checks.json").read_text())
    assert checks["equal_weights"] == 35
    assert list(place.glob(".*")) == []


@pytest.fixture(scope="module")
def runtime(place: Path) -> Runtime:
    package = import_runtime()
    if package is None:
        pytest.skip("xllamacpp is not installed")
    return Runtime(package, place / "gguf" / "model.gguf")


def test_llama_cpp_continues_as_torch_does(place: Path, runtime: Runtime) -> None:
    """64 greedy tokens behind one of several prompts: behind others two may be as likely but for int8's last place."""
    source = Source(place / "story")
    written = Written(place / "gguf" / "model.gguf", source, family_of(source))
    model = float_model(source, written)
    round_inputs(model, source, written)
    # BOS ends a story in its settings; here another begins.
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(place / "story")

    def equal(prompt: str) -> bool:
        ids = tokenizer(prompt)["input_ids"]
        assert runtime.tokens(prompt) == ids
        whole = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0]
        return whole[len(ids) :].tolist() == runtime.greedy(ids, 64)

    assert any(map(equal, PROMPTS))


def test_the_card_says_what_was_found(place: Path, runtime: Runtime) -> None:
    ran = json.loads((place / "gguf" / "checks.json").read_text())["llama.cpp"]
    card = (place / "gguf" / "README.md").read_text()
    assert f"Behind {ran['equal_tokens']} of {ran['tokens']} tokens" in card
    assert re.search(r"as a GGUF file for llama\.cpp: embedding f16, head f16", card)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--artefact", "story", "--out", "gguf"), "--overwrite", "1"),
        (
            ("--artefact", "story", "--out", "new", "--to.head", "q4_0"),
            "head is 'q4_0': Input should be 'f16' or 'q8_0'",
            "1",
        ),
        (("--artefact", "online", "--out", "new"), "turns the inputs of o_proj (R4) and down_proj (R5)", "1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    place: Path,
    kurtail: Kurtail,
    arguments: tuple[str, ...],
    message: str,
    code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not (place / "online").exists():
        kurtail(place, "fuse", "--model", "model", "--method", "quarot", "--out", "online")
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match=code):
        kurtail(place, "export", "--to", "gguf", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(place.rglob("*")) == before


def test_what_would_be_garbage_can_be_forced(
    place: Path, kurtail: Kurtail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so at once, in the card, and when it is inspected."""
    kurtail(tmp_path, "fuse", "--model", place / "model", "--method", "quarot", "--out", "online")
    capsys.readouterr()
    kurtail(tmp_path, "export", "--to", "gguf", "--artefact", "online", "--out", "forced", "--force")
    assert "forced: the artefact turns the inputs of o_proj (R4) and down_proj (R5)" in capsys.readouterr().err
    assert not (tmp_path / "forced" / "checks.json").exists()
    assert "**It answers with garbage, and was forced: " in (tmp_path / "forced" / "README.md").read_text()
    assert json.loads((tmp_path / "forced" / "kurtail_export.json").read_text())["garbage"].startswith("the artefact")
    kurtail(tmp_path, "inspect", "forced/model.gguf")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| llama.cpp")]
    assert "| garbage " in row
