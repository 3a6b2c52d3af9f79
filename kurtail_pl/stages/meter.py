"""What a stage cost: seconds and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")


class Meter:
    """Measures the block it is used on.

    `seconds` is wall time, `cpu_seconds` the processor time of all threads, `peak_bytes` the largest resident memory of
    the process within the block (on Linux; elsewhere since the process began), and `device_peak_bytes` the largest
    amount of memory allocated on the CUDA device, 0 without one.

    Args:
        earlier: what a part of the same work cost that another process did, as `to_dict` gave it; it is added.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self._earlier: Mapping[str, float] = earlier or {}
        self._running = False
        self._add(0.0, 0.0, 0, 0)

    def _add(self, seconds: float, cpu_seconds: float, peak_bytes: int, device_peak_bytes: int) -> None:
        earlier = self._earlier.get
        self.seconds = seconds + earlier("seconds", 0)
        self.cpu_seconds = cpu_seconds + earlier("cpu_seconds", 0)
        self.peak_bytes = max(peak_bytes, int(earlier("peak_bytes", 0)))
        self.device_peak_bytes = max(device_peak_bytes, int(earlier("device_peak_bytes", 0)))

    def __enter__(self) -> Self:
        _reset_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._running = True
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read()
        self._running = False

    def _read(self) -> None:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self._add(time.perf_counter() - self._wall, time.process_time() - self._cpu, _peak(), device)

    def to_dict(self) -> dict[str, float | int]:
        """Plain data for JSON; so far, while the block runs."""
        if self._running:
            self._read()
        return {
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "peak_bytes": self.peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
        }


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return  # Not Linux, or not allowed: the peak is then that of the whole process.


def _peak() -> int:
    held = _bytes_of(_STATUS, "VmHWM")
    if held is not None:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of memory that this process holds now (on Linux; elsewhere the most it held)."""
    held = _bytes_of(_STATUS, "VmRSS")
    return _peak() if held is None else held


def free_memory() -> int | None:
    """Bytes of memory that programs can still take, this one's own included; None where it is not Linux."""
    available = _bytes_of(_MEMINFO, "MemAvailable")
    return None if available is None else available + resident_memory()


def device_memory() -> int | None:
    """Bytes of the CUDA device's memory that programs can still take, this one's own included; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def _bytes_of(file: Path, field: str) -> int | None:
    """A field of a file under /proc, which counts in kilobytes; None where there is none."""
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
