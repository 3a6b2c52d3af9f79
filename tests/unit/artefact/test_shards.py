"""Weights written layer by layer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kurtail_pl.artefact.shards import ShardWriter, named


def test_what_is_written_is_what_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    # As when one process was killed and another goes on.
    writers = [ShardWriter(folder, scratch, parts=6) for _ in range(2)]
    for number, prefix in enumerate(("model.embed_tokens", *[f"model.layers.{i}" for i in range(4)])):
        writers[number > 2].write(number, named(prefix, model.get_submodule(prefix).state_dict()))
    assert not list(folder.iterdir())
    norm = named("model.norm", model.model.norm.state_dict())
    writers[1].write(5, {**norm, "lm_head.weight": model.lm_head.weight})
    writers[1].close()
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    model.config.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_a_part_that_was_not_written_is_missed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, tmp_path, parts=2)
    writer.write(0, {"a": torch.ones(2)})
    with pytest.raises(OSError, match="part-00001"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.safetensors"]
