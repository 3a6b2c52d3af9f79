"""Effects of noise in block inputs against transformers' own model with the same noise, and where they are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kurtail_pl.stages.capture.effects import NOISE, block_effects
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker

pytestmark = pytest.mark.usefixtures("cache")
WINDOWS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states_after(model: nn.Module, layer: int, norm: str | None, generator: torch.Generator) -> list[Tensor]:
    """After a layer of the whole model, for every window, with noise behind one of the layer's norms."""
    seen, block = [], model.model.layers[layer]
    handles = [block.register_forward_hook(lambda _, __, output: seen.append(output[0].double()))]
    if norm is not None:
        module = block.get_submodule(norm)

        def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return output + 0.1 * torch.randn(output.shape, generator=generator) * module.weight

        handles.append(module.register_forward_hook(add))
    for window in WINDOWS:
        model(window[None])
    for handle in handles:
        handle.remove()
    return seen


def test_effects_are_those_in_the_whole_model(tiny: Path) -> None:
    assert pytest.approx(0.01) == NOISE
    found = block_effects(Checkpoint(tiny), WINDOWS, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    expected = []
    for layer in range(4):
        generator = torch.Generator().manual_seed(3 * 4 + layer)
        clean = states_after(model, layer, None, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            noisy = states_after(model, layer, norm, generator)
            ratios = [((a - b) ** 2).sum(-1) / (b**2).sum(-1) for a, b in zip(noisy, clean, strict=True)]
            expected.append(np.mean(torch.cat(ratios).numpy()) / 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert len(set(found.tolist())) == 8


def test_taken_up_again_it_gives_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, advance, calls = block_effects(Checkpoint(tiny), WINDOWS, seed=0), Walker.advance, []

    def advance_or_die(self: Walker, layer: nn.Module, hidden: Tensor) -> Tensor:
        calls.append(layer)
        if len(calls) == 2 * 9 + 4:  # In the third layer, which like all others runs nine times.
            raise KeyboardInterrupt
        return advance(self, layer, hidden)

    monkeypatch.setattr(Walker, "advance", advance_or_die)
    with pytest.raises(KeyboardInterrupt):
        block_effects(Checkpoint(tiny), WINDOWS, seed=0)
    resumed = block_effects(Checkpoint(tiny), WINDOWS, seed=0)
    assert len(calls) == 2 * 9 + 4 + 2 * 9
    assert torch.equal(resumed, whole)
