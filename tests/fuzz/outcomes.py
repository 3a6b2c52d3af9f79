"""What an input may lead to: a result, or one of our errors in one line, soon and in little memory."""

import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kurtail_pl.errors import KurtailError

SECONDS, BYTES, LENGTH = 10, 2 * 10**9, 300
OURS = ("kurtail_pl", "kurtail_onnx")


class Finding(AssertionError):
    """An input led to something else.

    Args:
        kind: what is alike in findings of one cause.
        details: of this one.
    """

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(f"{kind}: {details}")
        self.kind = kind


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process take no more than `BYTES` beyond what it has: what asks for more gets an error of its own kind.

    On Linux; elsewhere nothing is limited.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        yield
        return
    taken = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def little_time() -> Iterator[None]:
    """Raise Finding after `SECONDS` of processor time: the clock on the wall would depend on what else runs."""

    def stop(_signal: int, frame: FrameType | None) -> None:
        raise Finding(f"longer than {SECONDS} s", _places(traceback.extract_stack(frame)))

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(read: Callable[[], object]) -> str:
    """Read an input; returns ``result`` or the name of our error.

    Raises:
        Finding: when it ends in anything else.
    """
    try:
        with little_time():
            read()
    except KurtailError as error:
        message = str(error)
        if len(message) > LENGTH or len(message.splitlines()) != 1:
            place = _places(traceback.extract_tb(error.__traceback__))
            raise Finding(f"{type(error).__name__} of many lines or characters{place}", message[:1000]) from error
        return type(error).__name__
    except (Finding, KeyboardInterrupt):
        raise
    except BaseException as error:  # Rust's panics are no exceptions.
        place = _places(traceback.extract_tb(error.__traceback__))
        raise Finding(f"{type(error).__name__}{place}", str(error)[:1000]) from error
    return "result"


def _places(stack: traceback.StackSummary) -> str:
    """The last line of ours in a stack, and its last line."""
    ours = [frame for frame in stack if any(f"/{package}/" in frame.filename for package in OURS)]
    return "".join(f" at {'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in (*ours[-1:], stack[-1]))
