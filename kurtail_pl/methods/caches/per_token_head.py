"""Integers with a scale for each token and head, as the paper and QuaRot have them; first tokens may be kept better."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.packing import pack_codes, unpack_codes
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, dequantize, fake_quantize, quantize, require_groups
from kurtail_pl.methods.cache import FLOAT_BITS, NOTHING, CacheFormat, bits_name
from kurtail_pl.methods.format import Tensors

NIBBLE = 4
"""Bits of which two codes are a byte."""


def _quantizer() -> Quantizer:
    return Quantizer(bits=4, symmetric=False, clip=Clip(amount=0.95))


@dataclass(frozen=True)
class Sinks:
    """The first tokens of a text, kept better than the others: those that attention rests on when it goes nowhere.

    Args:
        tokens: how many, by position; padding has no position.
        bits: of their keys and values: 16 leaves them float, 8 rounds them to a grid of 8 bits without clip.

    Raises:
        ConfigError: for no tokens, or other bits.
    """

    tokens: int = 1
    bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sinks.tokens is {self.tokens}; give 1 or more, or write sinks: null")
        if self.bits not in (8, 16):
            raise ConfigError(f"sinks.bits is {self.bits}; the first tokens are kept in 8 or 16 bits")

    def quantizer(self, others: Quantizer) -> Quantizer | None:
        """Quantizer of the first tokens' keys or values, given that of the others'; None leaves them float."""
        return None if self.bits == 16 else Quantizer(self.bits, others.symmetric, Clip(), others.group_size)


@dataclass(frozen=True)
class PerTokenHead(CacheFormat):
    """Keys and values in integers, a scale for each token and head, from its own numbers.

    Args:
        keys: their quantizer; null leaves them in floating point.
        values: the same.
        sinks: the first tokens, whose keys and values are kept in more bits; null for none.
        centre_keys: subtract each channel's mean over the calibration text from the rotated keys before they are
            quantized; the softmax takes no notice.

    Raises:
        ConfigError: when neither keys nor values are quantized, or keys are centred that are not.
    """

    keys: Quantizer | None = field(default_factory=_quantizer)
    values: Quantizer | None = field(default_factory=_quantizer)
    sinks: Sinks | None = None
    centre_keys: bool = False

    # The annotation lets a recipe go over another key by key: jsonargparse reads those of all bases by the names that
    # this module knows, and without ClassVar would know no type here.
    label: ClassVar[str] = "per-token-head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is None and self.values is None:
            raise ConfigError("cache.keys and cache.values are null; write cache: null, which is floating point")
        if self.centre_keys and self.keys is None:
            raise ConfigError("centre_keys is true and keys is null; keys are centred for their quantizer alone")

    def sentence(self) -> str:
        """Both quantizers, and what is done beside."""
        both = self.keys == self.values
        said = (
            f"keys and values in {self.keys}" if both else f"keys in {_said(self.keys)}; values in {_said(self.values)}"
        )
        if self.centre_keys:
            said += "; each channel's mean subtracted from keys"
        if self.sinks is not None:
            said += f"; the first {self.sinks.tokens} tokens in {self.sinks.bits} bits"
        return said

    @property
    def name(self) -> str:
        """Bits of both."""
        return bits_name(*(None if part is None else part.bits for part in (self.keys, self.values)))

    @property
    def first_tokens(self) -> int:
        """The sinks."""
        return 0 if self.sinks is None else self.sinks.tokens

    def require(self, head_dim: int) -> None:
        """Groups must divide the width."""
        for name, quantizer in (("keys", self.keys), ("values", self.values)):
            if quantizer is not None:
                require_groups(name, quantizer.group_size, (head_dim,))

    def kept_keys(self, keys: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """Fake-quantized."""
        return self._kept(keys, self.keys, first)

    def kept_values(self, values: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """Fake-quantized."""
        return self._kept(values, self.values, first)

    @property
    def packs(self) -> bool:
        """Unless first tokens are kept otherwise, or levels are no integers."""
        quantizers = [part for part in (self.keys, self.values) if part is not None]
        return self.sinks is None and all(each.levels == "integer" for each in quantizers)

    def stored(self, part: str, states: Tensor) -> Tensors:
        """Codes, two to a byte up to 4 bits, a scale for each group, and a zero point of a byte."""
        quantizer = self.quantizer(part)
        if quantizer is None:
            return {"states": states}
        codes, grid = quantize(states, quantizer)
        packed = pack_codes(codes) if quantizer.bits <= NIBBLE else codes  # RoPE turns pairs: heads are even.
        zero_point = {} if grid.zero_point is None else {"zero_point": grid.zero_point.to(torch.uint8)}
        return {"codes": packed, "scale": grid.scale, **zero_point}

    def read(self, part: str, stored: Tensors) -> Tensor:
        """Dequantized."""
        quantizer = self.quantizer(part)
        if quantizer is None:
            return stored["states"]
        codes, scale, zero_point = stored["codes"], stored["scale"], stored.get("zero_point")
        if quantizer.bits <= NIBBLE:
            codes = unpack_codes(codes, quantizer.symmetric)
        return dequantize(Quantized(codes, Grid(scale, None if zero_point is None else zero_point.to(scale.dtype))))

    def bits_per_number(self, part: str, kv_heads: int, head_dim: int) -> float:
        """Codes, and for each group a float32 and the byte of its zero point."""
        quantizer = self.quantizer(part)
        if quantizer is None:
            return FLOAT_BITS
        code = NIBBLE if quantizer.bits <= NIBBLE else 8
        return code + (32 if quantizer.symmetric else 40) / (quantizer.group_size or head_dim)

    def quantizer(self, part: str) -> Quantizer | None:
        """That of keys, or of values."""
        return {"keys": self.keys, "values": self.values}.get(part)

    def with_quantizer(self, part: str, quantizer: Quantizer) -> Self:
        """Another for keys, or for values."""
        return replace(self, keys=quantizer) if part == "keys" else replace(self, values=quantizer)

    def without(self, part: str) -> CacheFormat | None:
        """Keys in floating point need no centre."""
        if part == "keys":
            return None if self.values is None else replace(self, keys=None, centre_keys=False)
        return None if self.keys is None else replace(self, values=None)

    def _kept(self, x: Tensor, quantizer: Quantizer | None, first: Tensor | None) -> Tensor:
        if quantizer is None:
            return x
        quantized = fake_quantize(x, quantizer)
        if self.sinks is None or first is None:
            return quantized
        finer = self.sinks.quantizer(quantizer)
        return torch.where(first, x if finer is None else fake_quantize(x, finer), quantized)


def _said(quantizer: Quantizer | None) -> str:
    return "float" if quantizer is None else str(quantizer)
