"""What the channels of a decoder layer hold, measured while a text goes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kurtail_pl.maths.massive import is_massive
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import watched_scores


class Held(ABC):
    """What channels hold over all tokens seen, ``[..., n]``."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._magnitudes: Tensor | None = None
        self._tokens = 0

    def see(self, rows: Tensor, massive: Tensor | None = None) -> None:
        """Count tokens in.

        Args:
            rows: ``[..., tokens, n]``.
            massive: which of them are massive tokens', ``[tokens]``; None tells by the rows themselves.
        """
        magnitudes = rows.abs()
        ordinary = ~(is_massive(rows.movedim(-2, 0).flatten(1)) if massive is None else massive)
        largest, total = magnitudes.amax(-2), magnitudes[..., ordinary, :].sum(-2)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._magnitudes = total if self._magnitudes is None else self._magnitudes + total
        self._tokens += int(ordinary.sum())

    @property
    def largest(self) -> Tensor:
        """Largest magnitude."""
        assert self._largest is not None
        return self._largest

    @property
    def mean(self) -> Tensor:
        """Mean magnitude over the tokens that are not massive."""
        assert self._magnitudes is not None
        return self._magnitudes / self._tokens

    @property
    @abstractmethod
    def energy(self) -> Tensor:
        """Squares, as they count."""


class Shares(Held):
    """Shares of channels in their tokens' sums of squares, so that massive tokens count as any other."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None

    def see(self, rows: Tensor, massive: Tensor | None = None) -> None:
        """Count tokens in: ``[tokens, n]``."""
        super().see(rows, massive)
        squares = rows.square()
        size = squares.sum(-1, keepdim=True)
        sums = (squares / size.clamp(min=torch.finfo(size.dtype).tiny)).sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def energy(self) -> Tensor:
        """Sum of the shares over tokens."""
        assert self._sums is not None
        return self._sums


class Spread(Held):
    """Mean squares of channels, all tokens alike."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None

    def see(self, rows: Tensor, massive: Tensor | None = None) -> None:
        """Count tokens in: ``[..., tokens, n]``."""
        super().see(rows, massive)
        sums = torch.stack([part.sum(-2) for part in (torch.ones_like(rows), rows, rows.square())])
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def energy(self) -> Tensor:
        """Mean square."""
        assert self._sums is not None
        return self._sums[2] / self._sums[0]

    @property
    def variance(self) -> Tensor:
        """Mean square about the mean, which is what is left where the mean is subtracted or matched."""
        assert self._sums is not None
        mean = self._sums[1] / self._sums[0]
        return (self.energy - mean.square()).clamp(min=0)


@dataclass(frozen=True)
class Channels:
    """What was measured of one layer.

    Attributes:
        inputs: of what linears read, by the linear's name, ``[in]``.
        normed: of what norms give, by the norm's name, ``[hidden]``; all tokens are of one size there.
        keys: after RoPE, ``[kv_heads, head_dim]``.
        queries: before RoPE, which keeps the energy of two channels that it turns together, ``[heads, head_dim]``.
    """

    inputs: dict[str, Shares] = field(default_factory=dict)
    normed: dict[str, Spread] = field(default_factory=dict)
    keys: Spread = field(default_factory=Spread)
    queries: Spread = field(default_factory=Spread)


@contextmanager
def measured_inputs(layer: nn.Module, names: Iterable[str], found: Channels) -> Iterator[None]:
    """While a layer runs, measure what some linears read."""

    def watch(name: str) -> RemovableHandle:
        shares = found.inputs[name] = Shares()
        linear = folding.linear_of(layer, name)
        return linear.register_forward_pre_hook(lambda _, read: shares.see(read[0].flatten(0, -2)))

    with _removed([watch(name) for name in names]):
        yield


@contextmanager
def measured_norms(
    layer: nn.Module, names: Iterable[str], normed: Callable[[Tensor], Tensor], found: Channels
) -> Iterator[None]:
    """While a layer runs, measure what some norms will give once their weight is folded and R1 turns them.

    Args:
        layer: the original one.
        names: of the norms.
        normed: what they will give, made from what they read now, both ``[tokens, hidden]``.
        found: where it goes.
    """

    def watch(name: str) -> RemovableHandle:
        spread = found.normed[name] = Spread()

        def see(_: nn.Module, read: tuple[Tensor, ...]) -> None:
            states = read[0].flatten(0, -2)
            spread.see(normed(states), is_massive(states))  # All tokens are of one size behind a norm.

        return layer.get_submodule(name).register_forward_pre_hook(see)

    with _removed([watch(name) for name in names]):
        yield


@contextmanager
def measured_keys(layer: nn.Module, architecture: Architecture, head_dim: int, found: Channels) -> Iterator[None]:
    """While a layer runs, measure its keys and queries."""
    width = folding.linear_of(layer, architecture.output).in_features

    def see_queries(_: nn.Module, __: object, written: Tensor) -> None:
        # Where one linear makes all three, queries come first.
        rows = written[..., :width].flatten(0, -2)
        found.queries.see(rows.view(len(rows), -1, head_dim).transpose(0, 1))

    hook = folding.linear_of(layer, architecture.query).register_forward_hook(see_queries)
    attention = layer.get_submodule(architecture.attention)
    with _removed([hook]), watched_scores(attention, lambda seen: found.keys.see(seen.key[0])):
        yield


@contextmanager
def _removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
