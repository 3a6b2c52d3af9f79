"""Formats of caches: how keys and values are kept, said by what attention reads of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

from torch import Tensor

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.methods.method import Method

FLOAT_BITS = 16.0
"""Of a number that is kept as a float."""
NOTHING: Tensors = {}
"""Found by no calibration."""


class CacheFormat(Method):
    """How the keys and values of a text are kept.

    Both are ``[batch, kv_heads, tokens, head_dim]``, keys as they are behind RoPE and R3. What is kept of a token
    depends on that token alone, so that it does not matter when it is written.

    Attributes:
        centre_keys: whether each channel's mean over the calibration text is subtracted from keys before.
        before_rope: whether keys are kept as they are before RoPE and R3; keys and values are then rounded where they
            are made.
        sample: tokens of the calibration text at most whose keys and values a layer's `fitted` is given; None where
            nothing is fitted.
    """

    centre_keys: bool = False
    before_rope: ClassVar[bool] = False
    sample: ClassVar[int | None] = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Its bits, as part of a scheme's name: ``kv4``, or ``k4v2`` where keys and values differ."""

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text decides a part of it."""
        return self.centre_keys

    @property
    def first_tokens(self) -> int:
        """So many tokens at the beginning of a text are kept otherwise than the rest."""
        return 0

    def require(self, head_dim: int) -> None:
        """Raise ConfigError, naming the setting, when it cannot keep heads of this width."""

    def require_text(self, tokens: int) -> None:
        """Raise ConfigError, naming the setting, when so many tokens of calibration text are too few."""

    def buffers(self, kv_heads: int, head_dim: int) -> dict[str, Buffer]:
        """The tensors that an artefact has of each layer: what `fitted` finds."""
        return {}

    def fitted(self, keys: Tensor, values: Tensor) -> Tensors:
        """What keys and values ``[tokens, kv_heads, head_dim]`` of a calibration text decide for their layer."""
        return NOTHING

    @abstractmethod
    def kept_keys(self, keys: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """What attention reads of keys, in their type.

        Args:
            keys: centred, where that is asked for.
            first: ``[batch, 1, tokens, 1]``, true for the first tokens; None where these are nothing special.
            found: what was fitted for the layer.
        """

    @abstractmethod
    def kept_values(self, values: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """What attention reads of values, in their type."""

    @property
    def packs(self) -> bool:
        """Whether there is a stored form, smaller than the floats it stands for."""
        return False

    def stored(self, part: str, states: Tensor) -> Tensors:
        """Tensors ``[batch, kv_heads, tokens, any]`` that are held of ``keys`` or ``values`` ``[..., head_dim]``."""
        raise NotImplementedError(f"{type(self).__name__} has no stored form")

    def read(self, part: str, stored: Tensors) -> Tensor:
        """What attention reads of it, as `kept_keys` and `kept_values` give it."""
        raise NotImplementedError(f"{type(self).__name__} has no stored form")

    def bits_per_number(self, part: str, kv_heads: int, head_dim: int) -> float | None:
        """Bits of a number of ``keys`` or ``values``, with all that is stored of a token; None where that is not known.

        A float counts as 16, and first tokens that are kept otherwise do not count.
        """
        return None

    def multiplications(self, heads: int, kv_heads: int, head_dim: int) -> int:
        """Of one token in one layer, by maps of its own of queries, keys, values and what attention makes of them."""
        return 0

    def quantizer(self, part: str) -> Quantizer | None:
        """Quantizer of ``keys`` or ``values`` whose clip may be set for each layer; None where there is none."""
        return None

    def with_quantizer(self, part: str, quantizer: Quantizer) -> Self:
        """The same with another one of those."""
        raise NotImplementedError(f"{type(self).__name__} has no quantizer of {part}")

    def value_basis(self, head_dim: int) -> Tensor | None:
        """The fixed orthogonal matrix ``[head_dim, head_dim]``, float64, that rows of values are multiplied by before.

        They are rounded in that basis, behind R2. None where there is none.
        """
        return None

    @abstractmethod
    def without(self, part: str) -> CacheFormat | None:
        """The same with ``keys`` or ``values`` in floating point; None where nothing else is left."""


def bits_name(keys: int | None, values: int | None) -> str:
    """Bits of keys and values as a scheme's name has them; None is floating point."""
    return f"kv{keys or 16}" if keys == values else f"k{keys or 16}v{values or 16}"
