"""Progress of long work: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

log = logging.getLogger(__name__)
Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items, showing how far along the work is; not where log lines are not shown either."""
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        yield from bar(items, description=description, console=Console(stderr=True))
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done == len(items):
            log.info("%s: %d/%d after %.0f s", description, done, len(items), now - started)
            last = now
