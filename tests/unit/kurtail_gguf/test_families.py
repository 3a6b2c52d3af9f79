"""Files of every family and every form of weights: by gguf's own reader, and by llama.cpp, against the torch model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, dequantize
from ggufs import MODELS
from kurtail_gguf.exporter import GGUF
from kurtail_gguf.families import family_of
from kurtail_gguf.verify.file import Written
from kurtail_gguf.verify.mirror import float_model

import kurtail_pl
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import MXFP4, NVFP4, Format, PerTokenHead, Uniform
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
IDS = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
WIDE = {"num_attention_heads": 8}
"""Heads of a width together that blocks of 64 divide."""
FORMS: dict[str, tuple[str, Format | None, dict[str, Any], Kind]] = {
    "channels": ("qwen3", Uniform(scales="float16"), {}, Kind.Q4_0),
    "groups": ("llama3", Uniform(group_size=96, scales="float16"), {}, Kind.Q4_0),
    "three bits": ("qwen3", Uniform(3, scales="float16"), {}, Kind.Q4_0),
    "zero points": ("llama3", Uniform(4, False, scales="float16"), {}, Kind.Q4_1),
    "zero points of groups": ("mixtral", Uniform(4, False, 32, "float16"), {}, Kind.Q4_1),
    "eight bits": ("mistral", Uniform(8, scales="float16"), {}, Kind.Q8_0),
    "mxfp4": ("phi3", MXFP4(), {}, Kind.MXFP4),
    "nvfp4": ("qwen3_moe", NVFP4(), WIDE, Kind.NVFP4),
    "float": ("qwen2", None, {}, Kind.F16),
}


def checked(artefact: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """Export and check; what was found of llama.cpp."""
    pytest.importorskip("xllamacpp")
    written = export(artefact, folder, GGUF(**settings), check=True)
    ran: dict[str, Any] = json.loads((written / "checks.json").read_text())["llama.cpp"]
    assert ran["error"] <= ran["tolerance"]
    return ran


def equals_torch(artefact: Path, folder: Path) -> bool:
    """Whether transformers' plain model with the file's numbers has the logits of the artefact, as it is loaded."""
    source = Source(artefact)
    written = Written(folder / "model.gguf", source, family_of(source))
    with torch.no_grad():
        expected = kurtail_pl.load(artefact)(IDS).logits
        found = float_model(source, written)(IDS).logits
    # Some hundred sums of float32 numbers, each off by 6e-8.
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("family", MODELS)
def test_every_family(family: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(family)
    ran = checked(artefact, tmp_path / "gguf")
    # A token may be as likely as the next but for int8's noise.
    assert ran["equal_tokens"] >= 0.9 * ran["tokens"] > 0
    assert equals_torch(artefact, tmp_path / "gguf")


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    family, weights, changes, kind = FORMS[form]
    artefact = make_artefact(family, weights, changes)
    checked(artefact, tmp_path / "gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert tensors["blk.1.attn_output.weight"].tensor_type == kind
    # Nothing but the artefact and the package gguf: rows of o_proj are in one order everywhere.
    stored = tensors["blk.1.attn_output.weight"]
    values = dequantize(stored.data, stored.tensor_type)
    if kind == Kind.NVFP4:
        values = values * tensors["blk.1.attn_output.scale"].data
    linear = kurtail_pl.load(artefact).get_submodule("model.layers.1.self_attn.o_proj")
    expected = linear.dense_weight().numpy()
    assert np.array_equal(values, expected.astype(np.float16) if kind == Kind.F16 else expected)
    if kind != Kind.F16:
        assert equals_torch(artefact, tmp_path / "gguf")


def test_rows_of_queries_are_paired_for_llama_alone(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """Row 2 i of a head in the file is its row i, row 2 i + 1 its row i + half."""
    for family, turned in (("mistral", True), ("qwen3", False)):
        artefact = make_artefact(family)
        export(artefact, tmp_path / family, GGUF(), check=False)
        (stored,) = (
            tensor
            for tensor in GGUFReader(tmp_path / family / "model.gguf").tensors
            if tensor.name == "blk.0.attn_q.weight"
        )
        found = dequantize(stored.data, stored.tensor_type)
        ours = kurtail_pl.load(artefact).get_submodule("model.layers.0.self_attn.q_proj").dense_weight().numpy()
        head = [(row // 2) + (row % 2) * 8 for row in range(16)] if turned else list(range(16))
        assert np.array_equal(found, ours[[16 * (row // 16) + head[row % 16] for row in range(96)]])


def test_a_centre_is_in_the_biases(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """With what is quantized at run time set aside, the file is the artefact that subtracts means."""
    artefact = make_artefact("llama3", activations=Quantizer(8), centre=True)
    checked(artefact, tmp_path / "gguf")
    source, model = Source(artefact), kurtail_pl.load(artefact)
    centres = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            module.activations = None
            centres += float(source.tensor(f"{name}.centre").abs().max())
    assert centres > 0
    written = Written(tmp_path / "gguf" / "model.gguf", source, family_of(source))
    with torch.no_grad():
        expected, found = model(IDS).logits, float_model(source, written)(IDS).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_what_llama_cpp_does_itself_is_left_out_in_words(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact("qwen3", activations=Quantizer(levels="e2m1"), cache=PerTokenHead(centre_keys=True))
    checked(artefact, tmp_path / "gguf")
    left = " ".join(json.loads((tmp_path / "gguf" / "kurtail_export.json").read_text())["left_out"])
    assert all(
        part in left
        for part in ("R3", "activations, 4-bit floating point (E2M1)", "the cache, ", "mean subtracted from keys")
    )
    card = (tmp_path / "gguf" / "README.md").read_text()
    assert "llama-server -m model.gguf -ctk q4_0 -ctv q4_0 -fa on" in card
    assert f"left out: {left[:20]}" in card


def test_embedding_and_head_in_eight_bits(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact("llama3")
    checked(artefact, tmp_path / "small", embedding="q8_0", head="q8_0")
    checked(artefact, tmp_path / "large")
    for folder, kind, most in (("small", Kind.Q8_0, 0.5 / 127 + 2**-11), ("large", Kind.F16, 2**-11)):
        kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / folder / "model.gguf").tensors}
        assert kinds["token_embd.weight"] == kinds["output.weight"] == kind
        errors = json.loads((tmp_path / folder / "checks.json").read_text())["largest_errors"]
        assert set(errors) == {"token_embd.weight", "output.weight"}
        assert max(errors.values()) <= most
    assert (tmp_path / "small" / "model.gguf").stat().st_size < (tmp_path / "large" / "model.gguf").stat().st_size
