"""Tuners: they set what a recipe leaves open, clips of quantizers and bits of layers, by what the model does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantized, Quantizer
from kurtail_pl.methods.cache import CacheFormat
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.method import Method
from kurtail_pl.methods.rounder import Moments, Rounder
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.ranks import Ranks

Part = Literal["activations", "keys", "values"]
"""What has quantizers, a clip for each site of it."""


@dataclass
class Site:
    """What shares one quantizer in a decoder layer: linears that read the same inputs, the keys, or the values.

    Args:
        part: what it is of.
        modules: by their names in the layer.
    """

    part: Part
    modules: dict[str, nn.Module]

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of all of them; None where there is none."""
        held = self.held
        return held.quantizer(self.part) if isinstance(held, CacheFormat) else held

    @quantizer.setter
    def quantizer(self, quantizer: Quantizer) -> None:
        held = self.held
        self.held = held.with_quantizer(self.part, quantizer) if isinstance(held, CacheFormat) else quantizer

    @property
    def held(self) -> Quantizer | CacheFormat | None:
        """What the modules hold: the quantizer, or the format of keys and values."""
        found: Quantizer | CacheFormat | None = getattr(next(iter(self.modules.values())), self._attribute, None)
        return found

    @held.setter
    def held(self, held: Quantizer | CacheFormat | None) -> None:
        for module in self.modules.values():
            setattr(module, self._attribute, held)

    @property
    def _attribute(self) -> str:
        return "activations" if self.part == "activations" else "cache"

    def clip(self, ratio: float) -> dict[str, float]:
        """Give the quantizer a clip ratio; returns it by the quantizer's places in the layer, as cards have it."""
        assert self.quantizer is not None
        self.quantizer = self.quantizer.clipped(ratio)
        return {f"{name}.{self.part}": ratio for name in self.modules}


@contextmanager
def in_float(sites: Iterable[Site]) -> Iterator[None]:
    """Leave what sites are of in floating point for a while."""
    kept = [(site, site.held) for site in sites]
    for site, _ in kept:
        held = site.held
        site.held = held.without(site.part) if isinstance(held, CacheFormat) else None
    try:
        yield
    finally:
        for site, held in kept:
            site.held = held


class Reader(Protocol):
    """A linear as tuners see it."""

    def turn(self, x: Tensor) -> Tensor:
        """Its input ``[..., in]`` rotated and centred, not yet quantized."""

    def dense_weight(self) -> Tensor:
        """Its weight, ``[out, in]``."""


class Packed(Protocol):
    """A linear as tuners see it once its weight is codes."""

    weights: Format | None
    scale: Tensor

    def quantized(self) -> Quantized:
        """Codes and grid."""


class States(Protocol):
    """What a layer reads or writes in some windows, each ``[1, tokens, width]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: int) -> Tensor: ...

    def fill(self, states: Iterable[Tensor]) -> None:
        """Replace them, in order."""


class Block(NamedTuple):
    """A decoder layer as tuners see it.

    Attributes:
        sites: all that has a clip.
        run: states before the layer to states after it, as the layer stands.
        before: states of the tuner's own windows; none unless it asks for them.
        after: where what the layer writes there goes.
        ranks: the processes that share the windows.
        device: of the layer.
        packed: the modules whose weights are codes, each a `Packed`, once they are.
    """

    sites: list[Site]
    run: Callable[[Tensor], Tensor]
    before: States
    after: States
    ranks: Ranks
    device: torch.device
    packed: Callable[[], list[nn.Module]]


class Tuning:
    """What a tuner does to one decoder layer, in this order; here, nothing.

    Attributes:
        ratios: clip ratios that it found, by the quantizers' places in the layer.
    """

    def __init__(self, block: Block) -> None:
        """Look at the layer while its weights are float."""
        self.block = block
        self.ratios: dict[str, float] = {}

    def inputs(self, site: Site, readers: Sequence[Reader], inputs: Callable[[], Iterable[Tensor]]) -> None:
        """Before linears are solved that read the same inputs, of all windows, ``[1, tokens, in]`` each."""

    def cache(self, output: Reader, attended: Callable[[Iterable[Tensor]], Iterable[Tensor]], states: States) -> None:
        """Before the output projection is solved; `attended` makes its inputs of states before the layer."""

    def solved(self) -> None:
        """When all weights are what they will be."""


class Tuner(Method):
    """Sets what others have left open."""

    @abstractmethod
    def require(self, scheme: Scheme, quantized_activations: bool) -> None:
        """Raise ConfigError, naming the setting, when there is nothing of a scheme that it could set.

        Args:
            scheme: what it is for.
            quantized_activations: whether activations, keys and values are quantized while weights are solved.
        """


class ClipTuner(Tuner):
    """Gives each site of a layer a clip of its own.

    Attributes:
        parts: of which sites.
    """

    @property
    def own_windows(self) -> tuple[int, int] | None:
        """Windows, and tokens in each, of the calibration text that it wants apart from those of the weights."""
        return None

    @abstractmethod
    def tuning(self, block: Block) -> Tuning:
        """Its work on one layer."""


Trained = Literal["transforms", "diagonals", "clips", "weights"]


class TransformTuner(Tuner):
    """Trains each decoder layer, before its weights are solved, from float inputs to float outputs.

    Attributes:
        parts: ``transforms``: a Kronecker map of what each linear reads (of heads alone, before the output projection),
            a matrix for keys and one for values; ``diagonals``: a scale for each channel that the norms and `up_proj`
            write; ``clips``: a ratio for each quantizer of inputs, keys and values; ``weights``: a ratio for each row
            of a weight, the share of its range that its grid spans.
        orthogonal: maps are rotations.
        epochs: how often all windows are gone through.
        lr: size of the first step of transforms and diagonals.
        clip_lr: the same, of clips and of the weights' ratios.
        batch: windows in a step.
    """

    parts: list[Trained]
    orthogonal: bool
    epochs: int
    lr: float
    clip_lr: float
    batch: ClassVar[int] = 4

    @property
    @abstractmethod
    def own_windows(self) -> tuple[int, int]:
        """Windows, and tokens in each, of the calibration text, apart from those of the weights."""


class BitTuner(Tuner):
    """Gives each decoder layer's weights bits of their own.

    Attributes:
        average: bits of a weight over all layers.
    """

    average: float

    @abstractmethod
    def bits(self, weights: Format, sensitivities: Sequence[float]) -> list[int]:
        """Bits of each layer.

        Args:
            weights: their format.
            sensitivities: growth of the mean negative log-likelihood per relative square error of each layer's weights.
        """


class WeightTuner(Method):
    """Changes weights before they are rounded, which takes what a rounder takes."""

    @abstractmethod
    def require(self, scheme: Scheme, quantized_activations: bool, rounder: Rounder) -> None:
        """Raise ConfigError where there is nothing that it could make up for, or the rounder does so by itself."""

    @abstractmethod
    def tuned(self, weight: Tensor, moments: Moments) -> Tensor:
        """A weight ``[out, in]`` as it is rounded; the moments have the inputs before their quantizer, too.

        Raises:
            torch.linalg.LinAlgError: when the Hessian is not positive definite: the weight then stays as it is.
        """


def require_clipped(scheme: Scheme, parts: Sequence[str], quantized_activations: bool, setting: str) -> None:
    """Raise ConfigError unless parts of a scheme have quantizers whose clips are ratios of each token's own."""
    for part in parts:
        place, quantizer = f"scheme.{part}", scheme.activations
        if part != "activations":
            place, quantizer = f"scheme.cache.{part}", scheme.cache.quantizer(part) if scheme.cache else None
        if quantizer is None and scheme.cache is not None and part != "activations" and _rounds(scheme.cache, part):
            raise ConfigError(
                f"{setting} names {part}, and the cache keeps {scheme.cache.sentence()}, without clips: leave {part} "
                "out, or write scheme.cache.class_path: kurtail_pl.methods.PerTokenHead"
            )
        if quantizer is None or not quantized_activations:
            raise ConfigError(
                f"{setting} names {part}; only what is quantized has a clip: give {place}, and set "
                "quantized_activations: true"
            )
        if not quantizer.is_plain:
            raise ConfigError(
                f"{setting} names {part} and {place} is {quantizer}; clips are sought for integers with scales of any "
                f"size: leave {part} out, or write levels: integer and scales: float32"
            )
        if quantizer.clip.kind != "ratio":
            raise ConfigError(
                f"{setting} names {part} and {place}.clip is a {quantizer.clip.kind}; clips are sought among "
                "ratios: write clip.kind: ratio"
            )
    if "activations" in parts and scheme.static:
        raise ConfigError(
            f"{setting} names activations and scheme.activation_scales is static; a static grid is searched by itself: "
            "leave activations out, or write activation_scales: token"
        )


def _rounds(cache: CacheFormat, part: str) -> bool:
    """Whether a cache keeps keys, or values, in few bits."""
    return cache.without(part) != cache


def relative(change: Tensor, written: Tensor) -> Tensor:
    """Squared change over squared size of each token, summed over the tokens of ``[..., tokens, n]``."""
    size = written.double().square().sum(-1)
    return (change.double().square().sum(-1) / size.clamp(min=torch.finfo(size.dtype).tiny)).sum()
