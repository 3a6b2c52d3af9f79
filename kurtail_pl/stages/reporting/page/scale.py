"""Where a number is on an axis, and which numbers are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDE = 20.0
"""Of the largest to the smallest number: from here on an axis is logarithmic."""
TICKS = 5
SMALLEST, LARGEST = 1e-300, 1e300
"""Between which an axis is logarithmic: a little beyond them there are no floats."""


@dataclass(frozen=True)
class Scale:
    """An axis.

    Args:
        low: number at its beginning.
        high: at its end; larger.
        log: whether equal ways are equal factors; both are then positive.
    """

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a number, 0 at the beginning and 1 at the end; numbers beyond them are put there."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About five round numbers."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            few = last - first <= 2
            every = 1 if few else math.ceil((last - first) / TICKS)
            found = [d * 10.0**e for e in range(first, last + 1, every) for d in ((1, 2, 5) if few else (1,))]
        else:
            rough = (self.high - self.low) / TICKS
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            found = [n * step for n in range(first, last + 1)]
        return [value for value in found if self.low <= value <= self.high]


def scale_of(values: Iterable[float], log: bool | None = None) -> Scale:
    """An axis that holds numbers, with a little room; unless `log` is given, logarithmic where they differ much."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=1.0)
    if log is None:
        log = low > 0 and high / low > WIDE
    if log and low >= SMALLEST:
        room = max(math.exp(0.05 * (math.log(high) - math.log(low))), 1.05)
        return Scale(max(low / room, SMALLEST), min(high * room, LARGEST), log=True)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room)
