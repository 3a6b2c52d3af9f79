"""Hidden states before the first layer, for tests that walk a model themselves."""

import torch
from torch import Tensor

from kurtail_pl.streaming.walker import Walker


@torch.no_grad()
def embed(walker: Walker, windows: Tensor) -> list[Tensor]:
    embedding = walker.embedding()
    hidden = [embedding(window[None]) for window in windows]
    embedding.to("meta")
    return hidden
