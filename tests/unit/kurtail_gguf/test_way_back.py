"""The file read as any GGUF model is, by transformers, beside the artefact: metadata, rows, tokenizer and all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kurtail_gguf.exporter import GGUF
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.stages.export import export
from kurtail_pl.storage.gguf import from_gguf

MakeArtefact = Callable[..., Path]
IDS = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
TEXT = "Once upon a time, in 1984, they didn't."


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_reads_the_same_model(
    family: str, make_artefact: MakeArtefact, cache: Path, tmp_path: Path
) -> None:
    """Of the families that it reads; Llama 3.1's frequencies and YaRN among them."""
    artefact = make_artefact(family)
    exported = export(artefact, tmp_path / "gguf", GGUF(), check=False)
    folder = from_gguf(exported / "model.gguf", family)
    assert cache in folder.parents
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        expected = kurtail_pl.load(artefact)(IDS).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    ours, theirs = (AutoTokenizer.from_pretrained(place)(TEXT)["input_ids"] for place in (artefact, folder))
    assert ours == theirs
