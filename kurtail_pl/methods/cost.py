"""What methods take, for `kurtail plan`: each states its own, and a stage's plan is made of them."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
"""Bytes of a value."""
KEPT_HIDDEN, KEPT_WIDE = 14, 6
"""Values that a backward pass keeps for each token and layer, in widths of the residual stream and of the MLP."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and widths of a model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        widest: width of the widest linear's input, which decides the largest Hessian.
        wide: parameters of that linear.
        stack: parameters of all decoder layers.
        layer: parameters of one decoder layer, the largest.
        active: parameters that one token meets in a layer (fewer, in a mixture), the mean over layers.
        attention: query heads times their width.
        embedding: parameters of the embedding; the head has as many.
        ends: widths of what the linears of all decoder layers read, once for those that read the same, and write.
        stored: bytes of a parameter on disk.
        value: bytes of a value that layers compute with.
    """

    layers: int
    hidden: int
    widest: int
    wide: int
    stack: int
    layer: int
    active: int
    attention: int
    embedding: int
    ends: int
    stored: int
    value: int = FLOAT32

    def forward(self, tokens: int, seqlen: int) -> float:
        """FLOPs of all decoder layers on so many tokens in windows of a length."""
        return tokens * self.layers * (2.0 * self.active + 2.0 * seqlen * self.attention)


@dataclass(frozen=True)
class Cost:
    """What a method takes beside what its stage takes anyway.

    Attributes:
        memory: bytes while it works on one layer, after the layer's weights are solved.
        before: bytes before the layers are solved, of which `states` are a part.
        states: bytes of hidden states in files.
        disk: bytes of the artefact beside codes and floats.
        copies: matrices of a weight's size, float32, while that is solved.
        doubles: matrices of a Hessian's size, in its own type, while a weight is solved.
        singles: the same, float32 copies of float64 ones.
        flops: floating-point operations in matrix products.
        passes: values touched by elementwise work that takes longer than the products.
        again: whether the windows that weights are solved on go through each layer once more.
    """

    memory: int = 0
    before: int = 0
    states: int = 0
    disk: int = 0
    copies: int = 0
    doubles: int = 0
    singles: int = 0
    flops: float = 0.0
    passes: float = 0.0
    again: bool = False

    def hessian(self, width: int, exact: bool) -> int:
        """Bytes of a Hessian of a width and what is held beside it, of its size; `exact` ones are float64."""
        each = self.doubles * FLOAT64 + self.singles * FLOAT32 if exact else self.doubles * FLOAT32
        return width**2 * each
