"""An embedding that multiplies by a number; transformers' own keeps it in a buffer, which no checkpoint holds."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """What Gemma embeds tokens by.

    Args:
        embedding: transformers' own; its weight is shared.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, _weight=embedding.weight
        )
        self.scale = cast(float, embedding.scalar_embed_scale)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of tokens ``[...]``: ``[..., hidden]``. The number is a float32, then of the weight's type, as there."""
        scale = torch.tensor(self.scale, dtype=torch.float32, device=self.weight.device)
        return super().forward(input) * scale.to(self.weight.dtype)
