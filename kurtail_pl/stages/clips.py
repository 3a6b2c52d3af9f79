"""Clip search: for each site of a decoder layer, the clip ratio that changes least what the next linear writes.

The change of each token counts relative to that token: by plain squares, the few massive ones would decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.maths.quantizers import Clip, Quantizer, fake_quantize
from kurtail_pl.ranks import Ranks
from kurtail_pl.surgery.linear import QuantizedLinear

T = TypeVar("T")
Part = Literal["activations", "keys", "values"]
RATIOS = tuple(number / 20 for number in range(20, 12, -1))
"""From 1 to 0.65."""
WINDOW_STEP = 8


def some(windows: Iterable[T]) -> Iterator[T]:
    """The windows to search on: a single ratio needs few tokens."""
    return islice(windows, 0, None, WINDOW_STEP)


def search_inputs(linears: Sequence[QuantizedLinear], inputs: Iterable[Tensor], ranks: Ranks) -> float:
    """Give the quantizer of what linears read the best ratio, 1 where no tokens reach them, and return that.

    Args:
        linears: all that read the same inputs, with float weights.
        inputs: of some windows, ``[1, tokens, in]`` each.
        ranks: the processes that share the windows.
    """
    quantizer = linears[0].activations
    assert quantizer is not None
    weight = torch.cat([linear.dense_weight() for linear in linears])
    errors = torch.zeros(len(RATIOS), dtype=torch.float64, device=weight.device)
    for x in inputs:
        exact = linears[0].turn(x)
        written = F.linear(exact, weight)
        for number, ratio in enumerate(RATIOS):
            change = fake_quantize(exact, _clipped(quantizer, ratio)) - exact
            errors[number] += relative(F.linear(change, weight), written)
    best = _best(errors, ranks)
    for linear in linears:
        linear.activations = _clipped(quantizer, best)
    return best


def search_cache(
    attention: nn.Module,
    parts: Sequence[Part],
    output: QuantizedLinear,
    attended: Callable[[], Iterable[Tensor]],
    ranks: Ranks,
) -> dict[Part, float]:
    """Give the quantizers of keys and values the best ratios, each while the other is float, and return these.

    Args:
        attention: an equipped attention module.
        parts: whether keys, values or both are searched.
        output: the linear that reads what was attended to, with its float weight.
        attended: makes the inputs of `output` anew, of some windows, ``[1, tokens, in]`` each.
        ranks: the processes that share the windows.
    """

    def written() -> Iterable[Tensor]:
        return (F.linear(output.turn(x), output.dense_weight()) for x in attended())

    quantizers: dict[Part, Quantizer] = {part: getattr(attention, part) for part in parts}
    before = attention.keys, attention.values
    attention.keys = attention.values = None  # type: ignore[assignment]
    exact = list(written())
    best: dict[Part, float] = {}
    for part, quantizer in quantizers.items():
        errors = torch.zeros(len(RATIOS), dtype=torch.float64)
        for number, ratio in enumerate(RATIOS):
            setattr(attention, part, _clipped(quantizer, ratio))
            errors[number] = sum(relative(y - e, e).item() for y, e in zip(written(), exact, strict=True))
        setattr(attention, part, None)
        best[part] = _best(errors, ranks)
    attention.keys, attention.values = before
    for part, ratio in best.items():
        setattr(attention, part, _clipped(quantizers[part], ratio))
    return best


def _clipped(quantizer: Quantizer, ratio: float) -> Quantizer:
    return replace(quantizer, clip=Clip(amount=ratio))


def relative(change: Tensor, written: Tensor) -> Tensor:
    """Squared change over squared size of each token, summed over the tokens of ``[..., tokens, n]``."""
    size = written.double().square().sum(-1)
    return (change.double().square().sum(-1) / size.clamp(min=torch.finfo(size.dtype).tiny)).sum()


def _best(errors: Tensor, ranks: Ranks) -> float:
    return RATIOS[int(ranks.sum(errors).argmin())]
