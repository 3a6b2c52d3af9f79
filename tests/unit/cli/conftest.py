"""The verbs in this process, each test in a folder of its own."""

import logging
import sys
from pathlib import Path

# Its logger keeps the stderr of the moment it is imported: not that of a single test, which is closed afterwards.
import lightning  # noqa: F401
import pytest


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trainer verbs set sys.argv; and nothing may be written beside the tests."""
    log = logging.getLogger("kurtail_pl")
    for name in ("handlers", "level", "propagate"):  # the command sets up its own log
        monkeypatch.setattr(log, name, [] if name == "handlers" else getattr(log, name))
    monkeypatch.setattr(sys, "argv", ["kurtail"])
    monkeypatch.chdir(tmp_path)
