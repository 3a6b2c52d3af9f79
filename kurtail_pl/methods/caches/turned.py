"""Caches behind a fixed rotation of their own, as runtimes have them: turned, rounded, and turned back when read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods.cache import FLOAT_BITS, NOTHING, CacheFormat, bits_name
from kurtail_pl.methods.format import Tensors


class Turn(NamedTuple):
    """Float32 matrices ``[head_dim, head_dim]`` that rows are multiplied by, and that undo it."""

    forth: Tensor
    back: Tensor


@dataclass(frozen=True)
class TurnedCache(CacheFormat):
    """Keys and values rounded behind a fixed rotation.

    The runtime turns queries as it turns keys, and turns back what attention makes of values. Here keys and values are
    turned back themselves, which makes the same scores and outputs. R3, which such a runtime has not, comes before.

    Args:
        keys: whether keys are kept so; false leaves them in floating point.
        values: whether values are.

    Raises:
        ConfigError: when neither is.
    """

    keys: bool = True
    values: bool = True

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.keys or self.values):
            raise ConfigError("cache.keys and cache.values are false; write cache: null, which is floating point")

    @property
    def name(self) -> str:
        """Bits of both."""
        return bits_name(*(self.bits if kept else None for kept in (self.keys, self.values)))

    @property
    def what(self) -> str:
        """What is kept so, in words."""
        return " and ".join(part for part in ("keys", "values") if getattr(self, part))

    def without(self, part: str) -> CacheFormat | None:
        """The other alone, if it is kept so."""
        other = self.values if part == "keys" else self.keys
        return replace(self, **{part: False}) if other else None

    @abstractmethod
    def key_turn(self, head_dim: int, device: torch.device) -> Turn | None:
        """How keys are turned; None for not at all."""

    @abstractmethod
    def value_turn(self, head_dim: int, device: torch.device) -> Turn | None:
        """How values are turned; None for not at all."""

    @abstractmethod
    def rounded(self, turned: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes of turned rows ``[..., head_dim]`` stand for, both float32; `dtype` is the model's."""

    @abstractmethod
    def scale_bits(self, head_dim: int) -> float:
        """Bits of scales for each number."""

    def bits_per_number(self, part: str, kv_heads: int, head_dim: int) -> float:
        """Codes and scales."""
        kept = self.keys if part == "keys" else self.values
        return self.bits + self.scale_bits(head_dim) if kept else FLOAT_BITS

    def multiplications(self, heads: int, kv_heads: int, head_dim: int) -> int:
        """Queries turn as keys do, outputs as values; by the numbers of the matrices that are not zero."""
        cpu = torch.device("cpu")
        turns = (self.keys, self.key_turn(head_dim, cpu)), (self.values, self.value_turn(head_dim, cpu))
        each = (int(turn.forth.count_nonzero()) for kept, turn in turns if kept and turn is not None)
        return sum(each) * (heads + kv_heads)

    def value_basis(self, head_dim: int) -> Tensor | None:
        """The matrix of unit rows."""
        turn = self.value_turn(head_dim, torch.device("cpu"))
        return None if turn is None else torch.nn.functional.normalize(turn.forth.double(), dim=-1)

    def kept_keys(self, keys: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """Turned, rounded, turned back."""
        return self._kept(keys, self.key_turn(keys.shape[-1], keys.device)) if self.keys else keys

    def kept_values(self, values: Tensor, first: Tensor | None, found: Tensors = NOTHING) -> Tensor:
        """Turned, rounded, turned back."""
        return self._kept(values, self.value_turn(values.shape[-1], values.device)) if self.values else values

    def _kept(self, x: Tensor, turn: Turn | None) -> Tensor:
        with torch.no_grad():
            turned = x.float() if turn is None else x.float() @ turn.forth
            read = self.rounded(turned, x.dtype)
            kept = (read if turn is None else read @ turn.back).to(x.dtype)
        # Gradients pass straight through; what is added is zero.
        return kept + (x - x.detach()) if x.requires_grad else kept
