"""`kurtail export --to vllm` on the real stories260k: transformers alone writes the artefact's text."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import with_half_scales
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl

pytest.importorskip("compressed_tensors")

Kurtail = Callable[..., None]
FLOAT = ("--spec.scheme.activations", "null", "--spec.scheme.cache", "null")


@pytest.fixture(scope="module")
def place(stories: Path, kurtail: Kurtail, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``story``, of weights alone and fused rotations, and ``clipped``, as the paper has it."""
    place = tmp_path_factory.mktemp("vllm")
    kurtail(place, "fuse", "--model", stories, "--method", "quarot", "--online", "[]", "--out", "fused")
    rounded = ("quantize", "--artefact", "fused", "--spec.rounder", "RTN")
    kurtail(place, *rounded, "--out", "clipped")
    kurtail(place, *rounded, *FLOAT, "--out", "story")
    with_half_scales(place / "story")
    return place


def test_transformers_writes_the_artefacts_text(place: Path, kurtail: Kurtail) -> None:
    kurtail(place, "export", "--artefact", "story", "--out", "vllm", "--to", "vllm")
    checks = json.loads((place / "vllm" / "checks.json").read_text())
    assert checks["codes"]["linears"] == 35
    assert checks["mirror"]["logits_error"] < 1e-12
    assert checks["transformers"]["tokens"] == 12
    assert "35 linears and their scales are the artefact's" in (place / "vllm" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(place / "vllm")
    ids = tokenizer("Once upon a time, there was", return_tensors="pt")["input_ids"]
    models = kurtail_pl.load(place / "story"), AutoModelForCausalLM.from_pretrained(place / "vllm", dtype=torch.float32)
    ours, theirs = (tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0]) for model in models)
    assert ours == theirs
    assert len(ours.split()) > 15


def test_float_activations_are_asked_for_where_a_clip_is_refused(
    place: Path, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ("export", "--artefact", "clipped", "--out", "none", "--to", "vllm", "--to.dtype", "float32")
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, *export)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"--to\.dtype is float32.*, or export with --to\.activations none$", line)
    assert not (place / "none").exists()
    kurtail(place, *export, "--to.activations", "none")
    settings = json.loads((place / "none" / "kurtail_export.json").read_text())["export"]["settings"]
    assert settings == {"dtype": "float32", "activations": "none"}
    readme = (place / "none" / "README.md").read_text()
    assert "export with `--to.dtype float16` to serve the model" in readme
    assert "vllm serve" not in readme
