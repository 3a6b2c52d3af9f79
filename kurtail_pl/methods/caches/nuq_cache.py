"""Pre-RoPE keys per channel, values per token, on levels of their own, outliers apart (KVQuant, arXiv 2401.18079)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.kmeans import BINS, best_levels, binned, on_levels
from kurtail_pl.methods.cache import FLOAT_BITS, NOTHING, CacheFormat, bits_name
from kurtail_pl.methods.cost import FLOAT32, Cost, Sizes
from kurtail_pl.methods.format import Buffer, Tensors

Bits = Literal[2, 3, 4]
OUTLIER_BITS, NUMBER_BITS = 32, 16
"""An outlier is a value and its place, both of 16 bits; a token's values have two numbers of 16 bits, its range."""
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class NUQCache(CacheFormat):
    """Keys and values on the levels that are best for each layer (KVQuant's nuq), with outliers in 16 bits.

    Keys are kept as they are before RoPE, which mixes channels, each channel in a range of its own that the calibration
    text fixes. Values have a range for each token, over all KV heads. What lies outside is an outlier and stays. Inside
    numbers go from -1 to 1, and the levels there, one table for a layer's keys and one for its values, are exact
    k-means of the calibration text by squared error. (The authors weigh numbers by squared gradients of the loss, for
    which the whole model must be in memory.)

    Args:
        keys: their bits, 2, 3 or 4; null leaves them in floating point.
        values: the same.
        outliers: their share, half of it at each end: of each key channel over the calibration text, and of each
            token's values. Zero has none: what is beyond a key channel's range goes to its end.

    Raises:
        ConfigError: when neither keys nor values are quantized, or a share of outliers outside [0, 0.5].
    """

    keys: Bits | None = 4
    values: Bits | None = 4
    outliers: float = 0.01

    label: ClassVar[str] = "nuq"
    before_rope: ClassVar[bool] = True
    sample: ClassVar[int | None] = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is None and self.values is None:
            raise ConfigError("cache.keys and cache.values are null; write cache: null, which is floating point")
        if not 0 <= self.outliers <= 0.5:
            raise ConfigError(f"cache.outliers is {self.outliers}; give a share from 0 to 0.5")

    def sentence(self) -> str:
        """Both parts, and the outliers."""
        keys, values = ("float" if bits is None else f"{bits} bits" for bits in (self.keys, self.values))
        parts = f"keys before RoPE by channel in {keys}, values by token in {values}"
        return f"{parts}, k-means levels, {100 * self.outliers:g} % outliers"

    @property
    def name(self) -> str:
        """Bits of both."""
        return bits_name(self.keys, self.values)

    @property
    def calibrated(self) -> bool:
        """Ranges and levels."""
        return True

    def require_text(self, tokens: int) -> None:
        """Outliers of the text itself mark the ends of a key channel: without any, all that lies beyond would be one.

        Raises:
            ConfigError: when their share of the tokens is less than one.
        """
        if self.keys is not None and 0 < tokens * self.outliers < 1:
            raise ConfigError(
                f"cache.outliers is {self.outliers:g} and the calibration text has {tokens} tokens, fewer than one "
                f"outlier; give {math.ceil(1 / self.outliers)} tokens or more (text.windows times text.seqlen), or "
                "cache.outliers: 0"
            )

    def without(self, part: str) -> CacheFormat | None:
        """The other alone."""
        if part == "keys":
            return None if self.values is None else replace(self, keys=None)
        return None if self.keys is None else replace(self, values=None)

    def buffers(self, kv_heads: int, head_dim: int) -> dict[str, Buffer]:
        """The range of each key channel, and two tables."""
        ends, found = Buffer((kv_heads, 1, head_dim), torch.float32), {}
        if self.keys is not None:
            found = {"key_low": ends, "key_high": ends, "key_levels": Buffer((1 << self.keys,), torch.float32)}
        if self.values is not None:
            found["value_levels"] = Buffer((1 << self.values,), torch.float32)
        return found

    def fitted(self, keys: Tensor, values: Tensor) -> Tensors:
        """Quantiles of each key channel, and the levels of both."""
        found: Tensors = {}
        if self.keys is not None:
            beyond = round(len(keys) * self.outliers / 2)
            ends = _ends(keys.movedim(0, -1), beyond)
            low, high = (end.movedim(-1, 1) for end in ends)
            states = keys.transpose(0, 1)
            found = {"key_low": low, "key_high": high, "key_levels": _levels(states, low, high, self.keys)}
        if self.values is not None:
            rows = values.flatten(1)
            found["value_levels"] = _levels(rows, *self._range(rows), self.values)
        return found

    def kept_keys(self, keys: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """By the fixed range of each channel; as they are while nothing is found yet."""
        if self.keys is None or not found:
            return keys
        return _kept(keys, found["key_low"], found["key_high"], found["key_levels"], self.outliers > 0)

    def kept_values(self, values: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """By the range of each token over all KV heads; as they are while nothing is found yet."""
        if self.values is None or not found:
            return values
        rows = values.transpose(1, 2).flatten(2)
        kept = _kept(rows, *self._range(rows), found["value_levels"], self.outliers > 0)
        return kept.view(*rows.shape[:2], *values.shape[1::2]).transpose(1, 2)

    def _range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the range of each token ``[..., n]`` without its outliers, ``[..., 1]``."""
        return _ends(rows, round(rows.shape[-1] * self.outliers / 2))

    def bits_per_number(self, part: str, kv_heads: int, head_dim: int) -> float | None:
        """Codes, outliers with their places, and of values the range of each token."""
        own = self.keys if part == "keys" else self.values
        if own is None:
            return FLOAT_BITS
        ranges = 0.0 if part == "keys" else 2 * NUMBER_BITS / (kv_heads * head_dim)
        return own + OUTLIER_BITS * self.outliers + ranges

    def cost(self, sizes: Sizes) -> Cost:
        """One layer's keys and values of a sample of the text, sorted, and the tables of errors."""
        assert self.sample is not None
        return Cost(
            memory=4 * self.sample * sizes.attention * FLOAT32,
            passes=sizes.layers * float(BINS**2 * ((1 << (self.keys or 0)) + (1 << (self.values or 0)))),
        )


def _ends(x: Tensor, beyond: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of ``[..., n]`` without so many at each end, ``[..., 1]``."""
    low, high = (x.topk(beyond + 1, dim=-1, largest=largest).values[..., -1:] for largest in (False, True))
    return low, high


def _scaled(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from -1 to 1 within a range, and the range's middle and half."""
    middle, half = (high + low) / 2, (high - low) / 2
    return (x - middle) / torch.where(half > 0, half, torch.ones_like(half)), middle, half


def _levels(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Levels with the least squared error of what lies in its range, errors as they are outside of -1 to 1."""
    scaled, _, half = _scaled(x, low, high)
    inside = (x >= low) & (x <= high)
    means, masses = binned(scaled[inside], half.square().expand_as(x)[inside])
    if not len(means):  # Every range is a point.
        return torch.zeros(1 << bits)
    return best_levels(means, masses, 1 << bits).float()


def _kept(x: Tensor, low: Tensor, high: Tensor, levels: Tensor, outliers: bool) -> Tensor:
    """Numbers on levels, outliers of their range in float16 where there are any; gradients pass straight through."""
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        low, high, levels = (part.to(wide) for part in (low, high, levels))
        scaled, middle, half = _scaled(wide, low, high)
        inside = (wide >= low) & (wide <= high) if outliers else torch.ones_like(wide, dtype=torch.bool)
        outlier = wide.clamp(-LARGEST, LARGEST).half().to(wide)
        kept = torch.where(inside, on_levels(scaled, levels) * half + middle, outlier).to(x.dtype)
    return kept + (x - x.detach()) if x.requires_grad else kept
