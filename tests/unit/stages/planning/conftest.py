"""The environment of a process that is measured."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def kurtail_env() -> dict[str, str]:
    """Environment of a process that runs this checkout's `kurtail`."""
    root = str(Path(__file__).resolve().parents[4])
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": root}
