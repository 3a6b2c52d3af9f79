"""The verbs of the ONNX export on the real stories260k."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import kurtail_pl

Kurtail = Callable[..., None]


@pytest.fixture(scope="module")
def place(stories: Path, kurtail: Kurtail, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artefact ``story`` and its export ``onnx``."""
    place = tmp_path_factory.mktemp("onnx")
    kurtail(place, "fuse", "--model", stories, "--method", "quarot", "--out", "fused")
    kurtail(place, "quantize", "--artefact", "fused", "--spec.rounder", "RTN", "--out", "story")
    kurtail(place, "export", "--artefact", "story", "--out", "onnx")
    return place


def test_small_exports_are_checked(place: Path) -> None:
    checks = json.loads((place / "onnx" / "checks.json").read_text())
    assert checks["linears"] == {"quantized": 35, "fused": 35}
    differing = checks["layers"]["codes_differing"]
    assert f"{differing} of 13440 cached codes differ" in (place / "onnx" / "README.md").read_text()
    assert list(place.glob(".*")) == []


def test_generate_prints_torchs_text(place: Path, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind one of several prompts: behind the others a value may lie on the border of two codes."""
    tokenizer, model = AutoTokenizer.from_pretrained(place / "story"), kurtail_pl.load(place / "story")

    def printed(prompt: str, *options: object) -> str:
        options = ("--prompt", prompt, "--sampling.max_new_tokens", 24, *options)
        kurtail(place, "generate", "--onnx", "onnx", *options)
        return capsys.readouterr().out.strip()

    def equal(prompt: str) -> bool:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0]
        return printed(prompt) == tokenizer.decode(expected, skip_special_tokens=True).strip()

    prompts = ("Once upon a time, there was", "One day, a little girl", "Tom had a red ball and", "The dog ran to")
    assert any(map(equal, prompts))
    warm = ("--sampling.temperature", 1.5, "--sampling.seed")
    sampled = [printed(prompts[0], *warm, seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_eval_prints_torchs_perplexity(place: Path, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]) -> None:
    text = ("--text.windows", 2, "--text.seqlen", 128)
    values = []
    for model in (("--model", "story"), ("--onnx", "onnx"), ("--onnx", "onnx", "--profile", "fast")):
        kurtail(place, "eval", *model, *text)
        (value,) = re.findall(r"perplexity ([\d.]+)", capsys.readouterr().out)
        values.append(float(value))
    # A value that falls on the other side of a border moves what comes after it by a thousandth and more.
    assert values[1] == pytest.approx(values[0], rel=1e-2)
    assert values[2] != values[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--artefact", "story", "--out", "onnx"), "--overwrite"),
        (("export", "--artefact", "fused/..", "--out", "new"), "kurtail.json"),
        (("export", "--artefact", "fused", "--out", "new", "--to.weights", "integer"), "--to.weights integer"),
        (("generate", "--onnx", "story", "--prompt", "a"), "not a KurTail export"),
        (("generate", "--onnx", "onnx", "--prompt", "a", "--sampling.max_new_tokens", "600"), "512 positions"),
        (("eval", "--text.seqlen", "8", "--onnx", "onnx", "--model", "story"), "one of --model and --onnx"),
        (("eval", "--text.seqlen", "8"), "one of --model and --onnx"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, kurtail: Kurtail, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kurtail {arguments[0]}: ")
    assert message in line
    assert sorted(place.rglob("*")) == before
