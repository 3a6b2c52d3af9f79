"""What a model goes on with, against transformers' own generation and against one step after the other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kurtail_pl.artefact.load import load
from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import RTN
from kurtail_pl.stages.evaluation.continuation import continuation
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.storage.checkpoint import Checkpoint

PROMPT = "The old king"


def test_a_plain_model_writes_what_transformers_lets_it_write(tied: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(tied), AutoModelForCausalLM.from_pretrained(tied)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert continuation(Checkpoint(tied), PROMPT, 12) == expected != ""


@torch.no_grad()
def test_an_artefact_writes_its_most_likely_tokens(fused: Path, tmp_path: Path) -> None:
    """Without a cache: the whole text goes through the model for each token."""
    folder = quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path / "artefact")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    while ids.shape[1] < length + 12 and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert continuation(Checkpoint(folder), PROMPT, 12) == expected != ""


@pytest.mark.parametrize(("prompt", "refusal"), [("", "prompt is ''"), ("king " * 300, "256")])
def test_a_prompt_that_is_empty_or_too_long_is_refused(tied: Path, prompt: str, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        continuation(Checkpoint(tied), prompt, 4)
