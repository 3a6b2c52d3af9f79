"""Clip search: for each site of a decoder layer, the clip ratio that changes least what the next linear writes.

The change of each token counts relative to that token: by plain squares, the few massive ones would decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import fake_quantize
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import (
    Block,
    ClipTuner,
    Part,
    Reader,
    Site,
    States,
    Tuning,
    in_float,
    relative,
    require_clipped,
)

T = TypeVar("T")
RATIOS = tuple(number / 20 for number in range(20, 12, -1))
"""From 1 to 0.65."""
WINDOW_STEP = 8


@dataclass(frozen=True)
class SearchedClips(ClipTuner):
    """The best of eight clip ratios for each site.

    Args:
        parts: ``activations``, ``keys``, ``values``.

    Raises:
        ConfigError: for no parts or unknown ones.
    """

    parts: list[Part] = field(default_factory=lambda: ["activations", "keys", "values"])

    label = "searched"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError("clips.parts is empty; name some of activations, keys, values, or write clips: null")

    def sentence(self) -> str:
        """Its parts."""
        return f"a ratio of its own at each site for {', '.join(self.parts)}"

    def require(self, scheme: Scheme, quantized_activations: bool) -> None:
        """It looks at what is quantized while weights are solved."""
        require_clipped(scheme, self.parts, quantized_activations, "clips.parts")

    def tuning(self, block: Block) -> Tuning:
        """The search in one layer."""
        return _Search(block, self.parts)


class _Search(Tuning):
    def __init__(self, block: Block, parts: Sequence[Part]) -> None:
        super().__init__(block)
        self.parts = parts

    def inputs(self, site: Site, readers: Sequence[Reader], inputs: Callable[[], Iterable[Tensor]]) -> None:
        """The best ratio, 1 where no tokens reach the linears."""
        quantizer = site.quantizer
        if "activations" not in self.parts:
            return
        assert quantizer is not None
        weight = torch.cat([reader.dense_weight() for reader in readers])
        errors = torch.zeros(len(RATIOS), dtype=torch.float64, device=weight.device)
        for x in some(inputs()):
            exact = readers[0].turn(x)
            written = F.linear(exact, weight)
            for number, ratio in enumerate(RATIOS):
                change = fake_quantize(exact, quantizer.clipped(ratio)) - exact
                errors[number] += relative(F.linear(change, weight), written)
        self.ratios |= site.clip(self._best(errors))

    def cache(self, output: Reader, attended: Callable[[Iterable[Tensor]], Iterable[Tensor]], states: States) -> None:
        """The best ratios of keys and values, each while the other is float."""
        sites = [site for site in self.block.sites if site.part != "activations"]
        if not any(site.part in self.parts for site in sites):
            return

        def written() -> Iterable[Tensor]:
            windows = attended(states[window] for window in some(range(len(states))))
            return (F.linear(output.turn(x), output.dense_weight()) for x in windows)

        with in_float(sites):
            exact = list(written())
        for site in sites:
            if site.part in self.parts:
                with in_float(other for other in sites if other is not site):
                    errors = _errors(site, written, exact)
                self.ratios |= site.clip(self._best(errors))

    def _best(self, errors: Tensor) -> float:
        return RATIOS[int(self.block.ranks.sum(errors).argmin())]


def some(windows: Iterable[T]) -> Iterator[T]:
    """The windows to search on: a single ratio needs few tokens."""
    return islice(windows, 0, None, WINDOW_STEP)


def _errors(site: Site, written: Callable[[], Iterable[Tensor]], exact: Sequence[Tensor]) -> Tensor:
    """How far what is written is from the exact, for each ratio of a site."""
    errors = torch.zeros(len(RATIOS), dtype=torch.float64)
    for number, ratio in enumerate(RATIOS):
        site.clip(ratio)
        errors[number] = sum(relative(y - e, e).item() for y, e in zip(written(), exact, strict=True))
    return errors
