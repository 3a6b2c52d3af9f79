"""Times of the linears of a Llama-3-8B layer: W4A4 and W4A8 by humming-kernels against bfloat16, and the steps before.

Each time is the median of many replays of a CUDA graph between two events, after a buffer larger than the cache of the
card was written: at one token a layer's weights would else be read from that cache. The work of Python is not in it, as
it is not where a server replays graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_humming import Emulated, Humming
from torch import Tensor

from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_factors, hadamard_transform

FLUSH = 256 * 2**20
TOKENS = {"prefill": 2048, "decode": 1, "decode, batch of 16": 16}


class Shape(NamedTuple):
    """Linears of a layer that are alike: outputs, inputs, how many, and whether R4 or R5 comes before."""

    rows: int
    columns: int
    names: str
    number: int
    online: str | None


LLAMA_3_8B = (
    Shape(4096, 4096, "q", 1, None),
    Shape(1024, 4096, "k, v", 2, None),
    Shape(4096, 4096, "o", 1, "R4"),
    Shape(14336, 4096, "gate, up", 2, None),
    Shape(4096, 14336, "down", 1, "R5"),
)
TINY = (Shape(64, 128, "q", 1, None), Shape(64, 384, "down", 1, "R5"))


Rows = dict[str, dict[str, float]]
"""Milliseconds by what was timed, for each number of tokens."""


class Stopwatch:
    """Median milliseconds of a call on the GPU.

    Args:
        repeats: how often it is run.
        until: on the clock of `time.monotonic`; later calls are refused.
    """

    def __init__(self, repeats: int, until: float) -> None:
        self.repeats, self.until, self.without_graph = repeats, until, list[str]()
        self._buffer = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def median(self, name: str, call: Callable[[], Any]) -> float:
        """Raises TimeoutError when the time of all is over."""
        if time.monotonic() > self.until:
            raise TimeoutError("no time left; raise --seconds")
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        run = self._replay(name, call)
        pairs: list[list[Any]] = [[_event() for _ in range(2)] for _ in range(self.repeats)]
        for start, end in pairs:
            self._buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(float(start.elapsed_time(end)) for start, end in pairs)

    def _replay(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            self.without_graph.append(name)
            return call
        return graph.replay


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


Step = Callable[[Stopwatch, Shape, torch.dtype, int | None, Rows], dict[str, str] | None]


def weights(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random codes, in the layout of an export."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(1 << 31), 1 << 31, (shape.rows, shape.columns // 8), generator=generator)
    return {
        "weight_packed": codes.int(),
        "weight_scale": torch.full((shape.rows, 1), 0.01, dtype=dtype),
        "weight_shape": torch.tensor([shape.rows, shape.columns]),
    }


def measure(repeats: int, seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """All shapes, and sums over the layer; what stops is named under ``stopped`` and the rest goes on."""
    watch = Stopwatch(repeats, time.monotonic() + seconds)
    found: dict[str, Any] = {"unit": "milliseconds, median", "repeats": repeats, "linears": {}, "stopped": []}
    for shape in LLAMA_3_8B:
        rows: Rows = {name: {} for name in TOKENS}
        kernels: dict[str, str] = {}
        linear = {"shape": [shape.rows, shape.columns], "count": shape.number, "times": rows, "kernels": kernels}
        found["linears"][shape.names] = linear
        steps: list[tuple[Step, int | None]] = [
            (float_times, None),
            (online_times, None),
            (quantized_times, 4),
            (quantized_times, 8),
            (block_times, 4),
            (block_times, 8),
        ]
        for step, bits in steps:
            try:
                kernels |= step(watch, shape, dtype, bits, rows) or {}
            except Exception as error:
                text = str(error).strip().splitlines() or [type(error).__name__]
                what = "" if bits is None else f" W4A{bits}"
                found["stopped"].append(f"{shape.names},{what or ' float'}: {text[0][:200]}")
        torch.cuda.empty_cache()
    found["without a graph"] = watch.without_graph
    found["layer"] = {name: layer(found["linears"], name) for name in TOKENS}
    return found


def rehearse(dtype: torch.dtype) -> dict[str, Any]:
    """The same road on tiny shapes without a GPU: every product once, and no times."""
    found: dict[str, Any] = {"linears": {}, "stopped": []}
    for shape in TINY:
        x = torch.randn(2, shape.columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        for bits in (4, 8):
            output = Emulated(weights(shape, dtype), bits).whole(x)
            assert output.shape == (2, shape.rows)
        if shape.online is not None:
            hadamard_transform(x.float(), hadamard_factors(shape.columns))
        found["linears"][shape.names] = {"shape": [shape.rows, shape.columns], "count": shape.number, "times": {}}
    return found


def float_times(watch: Stopwatch, shape: Shape, _: torch.dtype, __: int | None, rows: Rows) -> None:
    """The product in bfloat16."""
    weight = torch.randn(shape.rows, shape.columns, device="cuda", dtype=torch.bfloat16)
    for name, tokens in TOKENS.items():
        x = torch.randn(tokens, shape.columns, device="cuda", dtype=torch.bfloat16)
        rows[name]["bfloat16"] = watch.median(f"{shape.names}: bfloat16, {name}", partial(torch.matmul, x, weight.T))


def online_times(watch: Stopwatch, shape: Shape, dtype: torch.dtype, _: int | None, rows: Rows) -> None:
    """The rotation before o and down: the dense product that vLLM does with an export, and by its two factors."""
    if shape.online is None:
        return
    factors = hadamard_factors(shape.columns)
    matrix = factors.dense().to(dtype).cuda()
    small = HadamardFactors(factors.left.to(dtype).cuda(), factors.right.to(dtype).cuda(), factors.construction)
    for name, tokens in TOKENS.items():
        x = torch.randn(tokens, shape.columns, device="cuda", dtype=dtype)
        rows[name]["rotation, dense"] = watch.median(f"{shape.names}: dense, {name}", partial(torch.matmul, x, matrix))
        by_factors = f"{shape.names}: factors, {name}"
        rows[name]["rotation, factors"] = watch.median(by_factors, partial(hadamard_transform, x, small))


def quantized_times(watch: Stopwatch, shape: Shape, dtype: torch.dtype, bits: int | None, rows: Rows) -> dict[str, str]:
    """Product, quantizer, and both; what it runs."""
    assert bits is not None
    product = Humming(weights(shape, dtype), bits, tuple(TOKENS.values()))
    inputs = {name: torch.randn(tokens, shape.columns, device="cuda", dtype=dtype) for name, tokens in TOKENS.items()}
    for name, x in inputs.items():
        calls: dict[str, Callable[[], Any]] = {
            "product": partial(product.multiplied, *product.codes(x)),
            "quantizer": partial(product.codes, x),
            "quantizer and product": partial(product.split, x),
        }
        for what, call in calls.items():
            rows[name][f"W4A{bits}, {what}"] = watch.median(f"{shape.names}: W4A{bits}, {what}, {name}", call)
    return {f"W4A{bits}, {name}": product.chosen(tokens) for name, tokens in TOKENS.items()}


def block_times(watch: Stopwatch, shape: Shape, dtype: torch.dtype, bits: int | None, rows: Rows) -> None:
    """The quantizer behind a Hadamard over the largest blocks of a power of two, in one kernel."""
    assert bits is not None
    if shape.online is None:
        return
    product = Humming(weights(shape, dtype), bits, tuple(TOKENS.values()))
    block = shape.columns & -shape.columns
    what = f"W4A{bits}, quantizer behind blocks of {block}"
    for name, tokens in TOKENS.items():
        x = torch.randn(tokens, shape.columns, device="cuda", dtype=dtype)
        rows[name][what] = watch.median(f"{shape.names}: {what}, {name}", partial(product.codes, x, block))


def layer(linears: dict[str, Any], name: str) -> dict[str, float]:
    """Sums over the layer's linears, of what was measured for all of them; rotations added where they are."""
    times = [(linear["times"][name], linear["count"]) for linear in linears.values()]
    sums = {}
    for what in (
        "bfloat16",
        *(f"W4A{bits}, {part}" for bits in (4, 8) for part in ("product", "quantizer and product")),
    ):
        if all(what in row for row, _ in times):
            sums[what] = sum(row[what] * count for row, count in times)
    for rotation in ("rotation, dense", "rotation, factors"):
        extra = [row[rotation] * count for row, count in times if rotation in row]
        for bits in (4, 8):
            whole = sums.get(f"W4A{bits}, quantizer and product")
            if whole is not None and extra:
                sums[f"W4A{bits}, quantizer, product and {rotation}"] = whole + sum(extra)
    return sums
