"""How fast this machine is, and what a planned stage takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kurtail_pl.streaming.compute import AUTO, Compute


@dataclass(frozen=True)
class Speed:
    """How fast this machine is: FLOPs of matrix products and values of elementwise work, both a second."""

    flops: float
    passes: float

    def seconds(self, flops: float, passes: float) -> float:
        """Estimate for so much work."""
        return flops / self.flops + passes / self.passes


def probe(compute: Compute = AUTO) -> Speed | None:
    """Measure the device for about half a second; None when it is not in this machine."""
    if compute.on_cuda and not torch.cuda.is_available():
        return None
    rows = 8192 if compute.on_cuda else 512
    with compute.torch_device:
        a, b = (torch.randn(n, 2 * rows, dtype=compute.torch_dtype) for n in (rows, 2 * rows))
    return Speed(_rate(lambda: a @ b, 2.0 * a.numel() * len(b)), _rate(lambda: a.mul_(1.0), a.numel()))


def _rate(work: Callable[[], object], amount: float) -> float:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    work()
    wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 0.25:
        work()
        wait()
        done += 1
    return done * amount / (time.perf_counter() - started)
