"""Weights written layer by layer: shards and their index."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kurtail_pl.artefact.shards import ShardWriter, named
from kurtail_pl.storage.weights import INDEX


def test_shards_are_what_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    """Written layer by layer, loaded by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    writer = ShardWriter(tmp_path, shards=6)
    for number, prefix in enumerate(("model.embed_tokens", *[f"model.layers.{i}" for i in range(4)])):
        writer.write(number, named(prefix, model.get_submodule(prefix).state_dict()))
    norm = named("model.norm", model.model.norm.state_dict())
    writer.write(5, {**norm, "lm_head.weight": model.lm_head.weight})
    writer.close()
    model.config.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
