"""Learned maps before each quantizer, their inverses in the weights, and clips, trained block by block (FlatQuant)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods.cost import FLOAT32, KEPT_HIDDEN, KEPT_WIDE, Cost, Sizes
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import Trained, TransformTuner, require_clipped

KEPT = 8
"""Values that quantizers keep for a number that they round, while what they round learns too."""


@dataclass(frozen=True)
class BlockTransforms(TransformTuner):
    """Trains each decoder layer on what the float layer writes, with what the float layer reads (FlatQuant).

    Source: arXiv 2410.09426, section 3. A map is ``U diag(d) V^T`` with orthogonal U and V. It starts as a random
    Hadamard, or as the identity behind a rotation that the model has already. Its inverse goes into the weights, so
    that the float model stays what it is. The codes of weights are made afterwards, by the rounder.

    Args:
        parts: ``transforms``: a Kronecker map of what each linear reads (of heads, before the output projection), a
            matrix for keys, one for values; ``diagonals``: a scale for each channel of what the norms and `up_proj`
            write; ``clips``: a ratio for each quantizer of inputs, keys and values; ``weights``: a ratio for each row
            of a weight, the share of its range that its grid spans; without it the format seeks the grid.
        orthogonal: keep d at 1, so that maps are rotations.
        epochs: how often all windows are gone through.
        lr: size of the first step of transforms and diagonals, which falls to a thousandth of it along a cosine.
        clip_lr: the same, of clips.
        windows: drawn from the calibration text apart from those that weights are solved on.
        seqlen: tokens in each.

    Raises:
        ConfigError: for no parts or unknown ones, or numbers that are not positive.
    """

    parts: list[Trained] = field(default_factory=lambda: ["transforms", "diagonals", "clips", "weights"])
    orthogonal: bool = False
    epochs: int = 15
    lr: float = 5e-3
    clip_lr: float = 5e-2
    windows: int = 128
    seqlen: int = 2048

    label = "flat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError(
                "transforms.parts is empty; name some of transforms, diagonals, clips, weights, or write "
                "transforms: null"
            )
        for name in ("epochs", "lr", "clip_lr", "windows", "seqlen"):
            value: float = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"transforms.{name} is {value}; give a positive number, or write transforms: null")

    def sentence(self) -> str:
        """Its parts."""
        kind = "orthogonal factors" if self.orthogonal else "invertible factors"
        named = {"transforms": f"Kronecker maps with {kind}", "clips": "clips", "weights": "ranges of weights"}
        return f"trained on each block's float output: {', '.join(named.get(part, part) for part in self.parts)}"

    def require(self, scheme: Scheme, quantized_activations: bool) -> None:
        """There must be what it trains for, and nothing that it does not see."""
        integers = None if scheme.weights is None else scheme.weights.integers
        if scheme.weights is not None and (integers is None or not integers.is_plain):
            raise ConfigError(
                f"transforms are given and scheme.weights are {scheme.weights.sentence()}; they are trained for "
                "integers: write weights.class_path: kurtail_pl.methods.Uniform, or transforms: null"
            )
        if "weights" in self.parts and scheme.weights is None:
            raise ConfigError(
                "transforms.parts names weights and scheme.weights is null; give it, or leave weights out"
            )
        if scheme.cache is not None and scheme.cache.before_rope:
            raise ConfigError(
                f"transforms are given and the cache keeps {scheme.cache.sentence()}, found on other keys and values: "
                "write scheme.cache.class_path: kurtail_pl.methods.PerTokenHead, or transforms: null"
            )
        found = {
            "activations": scheme.activations,
            **{part: scheme.cache.quantizer(part) if scheme.cache else None for part in ("keys", "values")},
        }
        for part, quantizer in found.items():
            if quantizer is not None and not quantizer.is_plain:
                raise ConfigError(
                    f"transforms are given and {part} are {quantizer}; they are trained for integers with scales of "
                    "any size: write levels: integer and scales: float32, or transforms: null"
                )
        clipped = [part for part, quantizer in found.items() if quantizer is not None]
        if scheme.weights is None and not clipped:
            raise ConfigError(
                "transforms are given and nothing is quantized; they are trained for quantizers: leave them out"
            )
        if "clips" in self.parts and not clipped:
            raise ConfigError("transforms.parts names clips, and nothing but weights is quantized; leave clips out")
        require_clipped(scheme, clipped, quantized_activations, "transforms")
        beside = {"centre": scheme.centre, "prefix": scheme.prefix is not None, "side": scheme.side is not None}
        for name, given in beside.items():
            if given:
                raise ConfigError(
                    f"scheme.{name} is given beside transforms, which are trained without; leave one of both out"
                )

    def cost(self, sizes: Sizes) -> Cost:
        """One layer's training: forward and backward, the quantized weights made anew in each step."""
        batch, tokens = self.batch * self.seqlen, self.windows * self.seqlen
        kept = KEPT * batch * (KEPT_HIDDEN * sizes.hidden + KEPT_WIDE * sizes.widest) + (KEPT + 4) * sizes.layer
        steps = self.epochs * math.ceil(self.windows / self.batch)
        return Cost(
            memory=kept * FLOAT32 + tokens * sizes.hidden * sizes.value,
            states=2 * tokens * sizes.hidden * sizes.value,
            flops=steps * 3 * sizes.forward(batch, self.seqlen) + sizes.forward(tokens, self.seqlen),
            passes=steps * 3.0 * KEPT * (sizes.stack + batch * sizes.layers * (3 * sizes.hidden + sizes.widest)),
        )

    @property
    def own_windows(self) -> tuple[int, int]:
        """Of the calibration text."""
        return self.windows, self.seqlen
