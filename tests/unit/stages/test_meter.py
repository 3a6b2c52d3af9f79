"""Costs of a block of work, and the versions that go with it."""

import mmap
import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from kurtail_pl.stages import meter as module
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.versions import versions

SIZE = 200_000_000
RESETTABLE = os.access("/proc/self/clear_refs", os.W_OK)


def touch(size: int) -> None:
    """Write to every page of that much memory, and give it back: what malloc is given back it may keep."""
    with mmap.mmap(-1, size) as block:
        block[:: mmap.PAGESIZE] = b"1" * len(range(0, size, mmap.PAGESIZE))


@pytest.mark.skipif(not RESETTABLE, reason="the peak of a block can be told on Linux only")
def test_peak_is_that_of_the_block() -> None:
    with Meter() as idle:
        pass
    with Meter() as busy:
        touch(SIZE)
    with Meter() as after:
        pass
    assert busy.peak_bytes - idle.peak_bytes > 0.9 * SIZE
    assert busy.peak_bytes - after.peak_bytes > 0.9 * SIZE


def test_peak_is_at_least_what_is_resident() -> None:
    with Meter() as meter:
        touch(10_000_000)
    assert 10_000_000 < meter.peak_bytes < 2**40


def test_seconds_and_processor_seconds() -> None:
    with Meter() as asleep:
        time.sleep(0.05)
    assert asleep.seconds >= 0.05
    assert asleep.cpu_seconds < asleep.seconds
    with Meter() as busy:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    assert busy.cpu_seconds >= 0.05


def test_an_exception_goes_through_and_is_measured() -> None:
    meter = Meter()
    with pytest.raises(RuntimeError, match="inside"), meter:
        raise RuntimeError("inside")
    assert meter.peak_bytes > 0


def test_plain_data() -> None:
    with Meter() as meter:
        pass
    data = meter.to_dict()
    assert set(data) == {"seconds", "cpu_seconds", "peak_bytes", "device_peak_bytes"}
    assert data["peak_bytes"] == meter.peak_bytes
    if not torch.cuda.is_available():
        assert data["device_peak_bytes"] == 0


def test_where_the_peak_cannot_be_reset_it_is_the_whole_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on macOS: neither file is there."""
    monkeypatch.setattr(module, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(module, "_STATUS", tmp_path / "none" / "status")
    unit = 1 if sys.platform == "darwin" else 1024
    with Meter() as meter:
        pass
    assert meter.peak_bytes == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_versions() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"python", "kurtail_pl", "torch", "transformers", "safetensors", "tokenizers"}
