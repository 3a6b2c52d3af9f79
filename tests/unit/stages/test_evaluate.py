"""An interrupted evaluation is taken up by the same one alone."""

from pathlib import Path

import pytest
from torch import Tensor, nn

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
    schemes = {"a4": Scheme(), "a16": Scheme(activations=None, keys=None, values=None)}
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
