"""Single steps on a GPU: an optimizer's, and online rotations."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kurtail_pl.maths.hadamard import hadamard_factors, random_hadamard
from kurtail_pl.maths.orthogonal import orthogonality_error
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.surgery.online import OnlineHadamard

TOKENS = 2048


def cayley(width: int, device: str, steps: int = 10) -> tuple[float, float]:
    """Seconds of a step of Cayley Adam on one matrix, and the matrix's error after twelve."""
    x = torch.nn.Parameter(random_hadamard(width, torch.Generator().manual_seed(0)).float().to(device))
    optimizer = CayleyAdam([x])
    x.grad = torch.randn_like(x)

    def run(count: int) -> float:
        before = time.perf_counter()
        for _ in range(count):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - before) / count

    run(2)
    return run(steps), float(orthogonality_error(x.detach()))


def hadamard(width: int, device: str) -> dict[str, float]:
    """Milliseconds of a rotation of bfloat16 rows ``[2048, width]``, of copying them, and of the package's kernel."""
    x = torch.randn(TOKENS, width, device=device, dtype=torch.bfloat16)
    online = OnlineHadamard(hadamard_factors(width)).to(device)
    calls: dict[str, Callable[[], Tensor]] = {"copy": x.clone, "KurTail": partial(online, x)}
    if importlib.util.find_spec("fast_hadamard_transform") is not None:
        package: Any = importlib.import_module("fast_hadamard_transform.fast_hadamard_transform_interface")
        if width & (width - 1) == 0:
            calls["fast-hadamard-transform"] = partial(package.hadamard_transform, x, width**-0.5)
        else:
            calls["fast-hadamard-transform, 28 N"] = partial(package.hadamard_transform_28N, x, width**-0.5)
    return {what: _median(call, device) for what, call in calls.items()}


def _median(call: Callable[[], Any], device: str, repeats: int = 50) -> float:
    """Milliseconds, each after the device's cache was written over."""
    flush = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.uint8, device=device)
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats if device == "cuda" else 2):
        flush.zero_()
        _wait(device)
        before = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - before)
    return 1e3 * statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
