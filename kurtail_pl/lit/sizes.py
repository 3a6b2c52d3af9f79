"""What modules have to know of the model that rotations are learned for."""

from __future__ import annotations

from typing import TypedDict


class _OfSomeFamilies(TypedDict, total=False):
    rigid_residual: str


class ModelSizes(_OfSomeFamilies):
    """Sizes of a model; the data module has them. A plain dictionary, so that checkpoints hold plain data.

    Attributes:
        layers: decoder layers.
        hidden_size: width of the residual stream.
        head_dim: width of a value head.
        kv_heads: key and value heads. Stored values may have more (`CaptureSpec.values`).
        rms_norm_eps: of the model's norms.
        rigid_residual: why the residual stream cannot be turned, in words, in families where each block input has an R1
            of its own (`Architecture.rigid_residual`).
    """

    layers: int
    hidden_size: int
    head_dim: int
    kv_heads: int
    rms_norm_eps: float
