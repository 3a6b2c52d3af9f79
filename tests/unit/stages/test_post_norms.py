"""Families with post-norms: what R1 turns is what the linears read, behind norms that keep their weights."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from families import tiny_family

from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    tiny_family("gemma3").save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def test_norms_keep_their_weights(gemma: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(gemma)
    fused = Checkpoint(fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused"))
    for norm in NORMS:
        name = f"model.layers.1.{norm}.weight"
        assert torch.equal(fused.tensor(name), checkpoint.tensor(name))
    name = "model.layers.1.mlp.gate_proj.weight"
    assert not torch.allclose(fused.tensor(name), checkpoint.tensor(name), atol=0.1)


@torch.no_grad()
def test_captured_rows_are_what_linears_read(gemma: Path, text_file: Path, tmp_path: Path) -> None:
    text = TextSpec(str(text_file), windows=2, seqlen=20, bos=True)
    store = capture(CaptureSpec(str(gemma), text, rows="all"), tmp_path / "store")
    assert store is not None
    model, seen = tiny_family("gemma3"), dict[str, torch.Tensor]()
    for site, name in (("attn_in", "self_attn.q_proj"), ("ffn_in", "mlp.up_proj")):
        linear = model.model.layers[1].get_submodule(name)
        linear.register_forward_pre_hook(lambda _, read, site=site: seen.update({site: read[0].flatten(0, 1)}))
    model(cut_windows(Checkpoint(gemma), text, "calibration", seed=0).tokens)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for site, rows in seen.items():
        torch.testing.assert_close(store.read(f"layer001.{site}", 0, 40), rows[order], rtol=1e-2, atol=1e-2)
