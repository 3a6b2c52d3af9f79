"""Which kernels an export really runs on, and where, by ONNX Runtime's own trace of a forward step."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kurtail_onnx.profiles import Profile
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import Device, open_session

FUSED = ("MatMulNBits", "MatMulInteger")
"""Kernels that multiply by weights of few bits; what is not fused runs as DequantizeLinear and MatMul."""
PARTS = ("transform", "key_transform", "side", "centre", "key_centre", "act_q", "kv_cache", "prefix", "lm_head")
"""Scopes whose kernels are told apart from others."""
PREFILL = (4,)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a forward step: its node, operator and execution provider, and the time it took."""

    node: str
    operator: str
    provider: str
    microseconds: int


def trace(
    export: Export,
    profile: Profile = "exact",
    device: Device = "cpu",
    steps: tuple[int, ...] = PREFILL,
    threads: int = 1,
) -> list[Kernel]:
    """Run an export and return the kernels of the last step.

    Args:
        export: the folder.
        profile: how the graph is run.
        device: where.
        steps: tokens of each step.
        threads: of one operator on the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(export.model, profile, device, threads, profiling=Path(folder) / "trace")
        decoder = Decoder(export, session, device=device)
        for count in steps:
            decoder.forward(np.zeros((1, count), np.int64))
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    started = max(event["ts"] for event in events if event["name"] == "model_run")
    return [
        Kernel(
            event["name"].removesuffix("_kernel_time"),
            event["args"]["op_name"],
            event["args"]["provider"],
            event["dur"],
        )
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= started
    ]


def fused_linears(kernels: list[Kernel]) -> int:
    """How many linears, but the head, multiply by weights of few bits."""
    return sum(_part(kernel) == "linears" for kernel in kernels)


def placement(kernels: list[Kernel]) -> dict[str, dict[str, int]]:
    """Execution provider -> operator -> number of kernels."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kernel in kernels:
        counts[kernel.provider][kernel.operator] += 1
    return {provider: dict(sorted(operators.items())) for provider, operators in sorted(counts.items())}


def time_by_part(kernels: list[Kernel]) -> dict[str, float]:
    """Share of the time of all kernels that each part of the graph takes."""
    times: Counter[str] = Counter()
    for kernel in kernels:
        times[_part(kernel)] += kernel.microseconds
    total = times.total()
    return {part: round(time / total, 4) for part, time in times.most_common()}


def _part(kernel: Kernel) -> str:
    # An inlined function's nodes are named after the function, not after the node that called it.
    if "Hadamard" in kernel.node:
        return "hadamard"
    for part in PARTS:
        if f"/{part}/" in kernel.node:
            return part
    if kernel.operator in FUSED:
        return "linears"
    return "attention" if kernel.operator == "Attention" else "other"
