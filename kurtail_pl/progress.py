"""Progress of long work: a bar on a terminal, a log line now and then elsewhere; and that of a plan of steps."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import track as bar

log = logging.getLogger(__name__)
Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items, showing how far along the work is; not where log lines are not shown either."""
    if _plan is not None:
        yield from _planned(_plan, items, description)
    elif draws_bars() and log.isEnabledFor(logging.INFO):
        yield from bar(items, description=description, console=Console(stderr=True))
    else:
        yield from _logged(items, description)


def _planned(steps: Steps, items: Sequence[Item], description: str) -> Iterator[Item]:
    for done, item in enumerate(items):
        steps.reached(description, done, len(items))
        yield item
    steps.reached(description, 1, 1)


def _logged(items: Sequence[Item], description: str) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done == len(items):
            log.info("%s: %d/%d after %.0f s", description, done, len(items), now - started)
            last = now


def plan_shown() -> Steps | None:
    """The steps that are shown in place of the progress of each work, if there are any."""
    return _plan


def draws_bars() -> bool:
    """Whether each work may draw a bar of its own."""
    return sys.stderr.isatty() and _plan is None


@dataclass(frozen=True)
class Step:
    """A step of a plan.

    Args:
        part: what it is a step of, such as the model that is made; those of a part follow one another.
        name: what is done.
        work: what `track` calls it.
        seconds: planned.
    """

    part: str
    name: str
    work: str
    seconds: float


class Steps:
    """Steps of a plan: which one is on, and how long the rest takes.

    How wrong a plan is depends on the machine and on the kind of work. What is left is therefore the planned seconds
    times what the same work took for each second planned; where it has not been done yet, what all work took.

    Args:
        steps: in their order, at least one.
        clock: seconds that have passed.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self._clock = steps, clock
        self._index, self._fraction = 0, 0.0
        self._started = self._began = self._looped = clock()
        self._done: list[tuple[str, float, float]] = []
        self.show: Callable[[], None] = lambda: None

    @property
    def step(self) -> Step:
        """The one that is on."""
        return self.steps[self._index]

    def begin(self, part: str) -> None:
        """Go on to the first step of a part, unless that has been made."""
        self._find(lambda step: step.part == part, 0.0)

    def reached(self, work: str, done: int, of: int) -> None:
        """Go on to the part's step of some work, so much of it done; other work counts for the step that is on."""
        self._find(lambda step: (step.part, step.work) == (self.step.part, work), done / of)

    def _find(self, wanted: Callable[[Step], bool], fraction: float) -> None:
        """Go on to the first step that is wanted, from the one that is on; stay there if there is none."""
        found = (index for index in range(self._index, len(self.steps)) if wanted(self.steps[index]))
        index = next(found, None)
        if index is not None:
            self._go_to(index, fraction)

    def _go_to(self, index: int, fraction: float) -> None:
        if index != self._index:
            if self._fraction:
                self._done.append((self.step.work, self.step.seconds, self._clock() - self._began))
            self._index, self._began = index, self._clock()
            self._looped = self._began
        if not fraction:
            self._looped = self._clock()
        self._fraction = fraction
        self.show()

    def seconds_left(self) -> float:
        """Until the last step is done, about."""
        rest = self.step.seconds * (1 - self._fraction) * self._rate(self.step.work)
        return rest + sum(step.seconds * self._rate(step.work) for step in self.steps[self._index + 1 :])

    def share(self) -> float:
        """How much of all time has passed, about: 0 to 1."""
        passed = self._clock() - self._started
        return passed / ((passed + self.seconds_left()) or 1.0)

    def _rate(self, work: str) -> float:
        """Seconds taken for each second planned."""
        done = list(self._done)
        if self._fraction:
            # What came before a loop is no part of each of its turns.
            done.append((self.step.work, self.step.seconds * self._fraction, self._clock() - self._looped))
        alike = [each for each in done if each[0] == work] or done
        return sum(taken for *_, taken in alike) / sum(planned for _, planned, _ in alike) if alike else 1.0

    def __str__(self) -> str:
        left = self.seconds_left()
        words = f"about {left / 60:.0f} min left" if left >= 60 else "under 1 min left"
        return f"step {self._index + 1} of {len(self.steps)}: {self.step.part}: {self.step.name}, {words}"


_plan: Steps | None = None


@contextmanager
def shown(steps: Steps) -> Iterator[None]:
    """Show these steps, in place of the progress of each work, until the block ends."""
    global _plan
    with _bar_of(steps) if sys.stderr.isatty() else _lines_of(steps):
        _plan = steps
        try:
            yield
        finally:
            _plan = None


@contextmanager
def _bar_of(steps: Steps) -> Iterator[None]:
    """One line that is drawn again, and is gone afterwards."""
    columns = TextColumn("{task.description}", markup=False), BarColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(str(steps), total=1.0)
        steps.show = lambda: progress.update(task, description=str(steps), completed=steps.share())
        yield


@contextmanager
def _lines_of(steps: Steps) -> Iterator[None]:
    """A log line for each step, and now and then within one."""
    shown: tuple[Step | None, float] = None, 0.0

    def show() -> None:
        nonlocal shown
        step, when = shown
        if steps.step is not step or time.monotonic() - when >= SECONDS_BETWEEN_LINES:
            shown = steps.step, time.monotonic()
            log.info("%s", str(steps))  # Now: what a record holds is read later.

    steps.show = show
    yield
