"""Sampled rows of weights against those of the checkpoint, folded by hand."""

from pathlib import Path

import torch
from families import tiny_family
from transformers import AutoModelForCausalLM

from kurtail_pl.stages.capture.weight_rows import weight_rows
from kurtail_pl.storage.checkpoint import Checkpoint


def test_rows_are_those_of_what_reads_each_block_input(tiny: Path) -> None:
    found = weight_rows(Checkpoint(tiny), 200, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert found.shape == (8, 200, model.config.hidden_size)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        readers = [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]
        for site, (norm, linears) in enumerate(readers, start=2 * index):
            folded = torch.cat([linear.weight * norm.weight for linear in linears]).detach()
            distance = (found[site][:, None] - folded[None]).abs().amax(-1)
            assert distance.amin(1).max() < 1e-6
            # Drawn alike from all: with 200 draws hardly a linear is left out, and no row is drawn most of the time.
            rows = distance.argmin(1)
            starts = torch.tensor([0, *[len(linear.weight) for linear in linears]]).cumsum(0)
            counts = torch.histogram(rows.double(), starts.double()).hist
            expected = 200 * starts.diff() / starts[-1]
            assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_rows_of_experts_and_a_seed(tmp_path: Path) -> None:
    model = tiny_family("mixtral")
    model.save_pretrained(tmp_path)
    first, again, other = (weight_rows(Checkpoint(tmp_path), 10, seed) for seed in (1, 1, 2))
    assert first.shape == (2 * model.config.num_hidden_layers, 10, model.config.hidden_size)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
