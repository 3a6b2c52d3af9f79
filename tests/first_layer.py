"""How far the first decoder layer of an artefact is from the float model's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kurtail_pl
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint


class FirstLayer:
    """What the first decoder layer writes in float64, by transformers' own calls, and how far it is from the float."""

    def __init__(self, fused: Path, text: TextSpec) -> None:
        self.windows = cut_windows(Checkpoint(fused), text, "calibration", seed=1).tokens
        self.exact = self.written(kurtail_pl.load(fused))

    @torch.no_grad()
    def written(self, model: Any) -> Tensor:
        found: list[Tensor] = []
        model.model.layers = model.model.layers[:1]
        with model.model.layers[0].register_forward_hook(lambda *call: found.append(call[2])):
            model.double()(self.windows)
        return found[0]

    def error(self, model: nn.Module) -> float:
        """Squared change over squared size, the mean of all tokens."""
        change = (self.written(model) - self.exact).norm(dim=-1) / self.exact.norm(dim=-1)
        return change.square().mean().item()
