"""HQQ (Badri and Shaji 2023, github.com/mobiusml/hqq): zero points that are no integers, without a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, split_groups
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.methods.format import Buffer, Format, Tensors
from kurtail_pl.methods.formats.uniform import Uniform
from kurtail_pl.methods.rounder import Moments, Rounder


@dataclass(frozen=True)
class FloatZero(Uniform):
    """Evenly spaced levels whose zero point is any number; asymmetric by nature.

    Args:
        bits: 2 to 8.
        symmetric: must be false.
        group_size: inputs that share a scale and a zero point; None for all of an output channel.
        scales: must be float32: float16 would not hold what these zero points make of them.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    symmetric: bool = False
    group_size: int | None = 64

    label = "float-zero"
    learnable = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric:
            raise ConfigError("weights.symmetric is true; a zero point that is any number is for asymmetric weights")
        if self.scales != "float32":
            raise ConfigError(
                f"weights.scales is {self.scales}, which does not hold the products of scales and zero points that are "
                "any number; write scales: float32, or class_path: kurtail_pl.methods.Uniform"
            )

    @property
    def integers(self) -> Quantizer | None:
        """None: its zero points are no integers."""
        return None

    def sentence(self) -> str:
        """With its zero points."""
        return f"{super().sentence()}, zero points in floating point"

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """The zero point is added before rounding."""
        assert zero_point is not None
        code = (x / scale).add_(zero_point).round_().clamp_(*self.code_range)
        return code, (code - zero_point) * scale

    def nearest(self, weight: Tensor) -> Quantized:
        """On the searched grid, whose zero points are integers."""
        return Format.nearest(self, weight)

    def pack(self, quantized: Quantized) -> Tensors:
        """The zero point as it is."""
        assert quantized.grid.zero_point is not None
        return {**super().pack(quantized), "zero_point": quantized.grid.zero_point}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """The zero point as it is."""
        codes, _ = super().unpack(tensors, columns)
        return Quantized(codes, Grid(tensors["scale"], tensors["zero_point"]))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """As the integers', but for the zero point's type."""
        return {**super().buffers(rows, columns), "zero_point": self.scale_buffer(rows, columns)}


@dataclass(frozen=True)
class HQQ(Rounder):
    """Fits each group's zero point to the weight by half-quadratic splitting, its scale being kept.

    The error is taken in steps of the grid: in the weights' own units, as HQQ's code has it, no error of a trained
    weight is so large that the norm differs from the square.

    Args:
        norm: p of the error ``|w - v|^p``; below 1 a few large errors count little.
        beta: weight of the quadratic term at the first round.
        kappa: factor of `beta` from round to round.
        rounds: at most; it ends when no group's error falls.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    label = "hqq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm < 1:
            raise ConfigError(f"norm is {self.norm}; give a number between 0 and 1")
        for name in ("beta", "kappa", "rounds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a positive number")

    def sentence(self) -> str:
        """In words."""
        return "rounded by HQQ"

    def cost(self, sizes: Sizes) -> Cost:
        """About ten elementwise steps a round."""
        return Cost(copies=6, passes=10 * self.rounds * float(sizes.stack))

    def require(self, weights: Format) -> None:
        """A zero point that is an integer has nothing to be fitted."""
        if not isinstance(weights, FloatZero):
            raise ConfigError(
                f"HQQ fits zero points that are any number, and the weights are {weights.sentence()}; write "
                "scheme.weights: {class_path: kurtail_pl.methods.FloatZero}"
            )

    def codes(self, weight: Tensor, weights: Format, moments: Moments) -> Quantized:
        """Of each group the zero point with the least error of all rounds, the searched one included."""
        scale, zero = weights.grid(weight)
        assert zero is not None
        steps = split_groups(weight.float(), weights.group_size) / scale.unsqueeze(-1)
        best, least, beta = zero, torch.full_like(zero, torch.inf), self.beta
        for _ in range(self.rounds + 1):
            codes = (steps + zero.unsqueeze(-1)).round_().clamp_(*weights.code_range)
            lost = steps - (codes - zero.unsqueeze(-1))
            error = lost.abs().pow(self.norm).sum(-1)
            better = error < least
            if not better.any():
                break
            least, best = torch.where(better, error, least), torch.where(better, zero, best)
            # What is left of an error when the norm has taken its part of it (the proximal step of |x|^p).
            part = lost.abs().pow(self.norm - 1).div_(beta)
            kept = lost.sign() * (lost.abs() - part).clamp_(min=0)
            zero, beta = (codes - (steps - kept)).mean(-1), beta * self.kappa
        codes, _ = weights.on_grid(
            split_groups(weight.float(), weights.group_size), scale.unsqueeze(-1), best.unsqueeze(-1)
        )
        return Quantized(codes.reshape(weight.shape).to(weights.code_dtype), Grid(scale, best))
