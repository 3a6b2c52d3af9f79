"""Perplexity against transformers' loss; an interrupted evaluation is taken up by the same one alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from walks import windows_of

from kurtail_pl.errors import TextError
from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker


@pytest.mark.usefixtures("cache")
def test_another_artefact_of_equal_weights_does_not_go_on(
    fused: Path, text: TextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes = {"a4": Scheme(), "a16": Scheme(activations=None, cache=None)}
    made = {
        name: Checkpoint(quantize(fused, QuantizeSpec(scheme=scheme, rounder=RTN()), tmp_path / name))
        for name, scheme in schemes.items()
    }
    assert made["a4"].sha256 == made["a16"].sha256
    alone = {name: perplexity(checkpoint, text)["perplexity"] for name, checkpoint in made.items()}
    assert alone["a4"] != alone["a16"]
    calls, advance = 0, Walker.advance

    def interrupted(self: Walker, layer: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 * 6:  # In the third of four layers, six windows each.
            raise KeyboardInterrupt
        return advance(self, layer, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(Walker, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            perplexity(made["a4"], text)
    assert perplexity(made["a16"], text)["perplexity"] == alone["a16"]
    assert perplexity(made["a4"], text)["perplexity"] == alone["a4"]


@pytest.mark.parametrize("which", ["tiny", "tied", "stories"])
def test_perplexity_is_that_of_transformers_loss(which: str, request: pytest.FixtureRequest, text: TextSpec) -> None:
    folder: Path = request.getfixturevalue(which)
    windows = windows_of(folder, text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        losses = [model(w.unsqueeze(0), labels=w.unsqueeze(0)).loss.double().item() for w in windows]
    measured = perplexity(Checkpoint(folder), text)
    assert measured["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert (measured["windows"], measured["seqlen"], measured["tokens"]) == (6, 48, 6 * 47)
    assert measured["source"] == text.source
    assert measured["cost"]["peak_bytes"] > 0


def test_a_fused_model_has_the_perplexity_of_the_original(tiny: Path, fused: Path, text: TextSpec) -> None:
    before, after = (perplexity(Checkpoint(f), text)["perplexity"] for f in (tiny, fused))
    assert after == pytest.approx(before, rel=1e-4)


def test_too_short_a_text(tiny: Path, text: TextSpec) -> None:
    with pytest.raises(TextError, match="were asked for"):
        perplexity(Checkpoint(tiny), replace(text, windows=10_000))
