"""One owner for each piece of work, with real processes."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kurtail_pl.errors import NotWritable
from kurtail_pl.storage.lock import alone_with

ROOT = Path(__file__).resolve().parents[3]
WORKER = """
import logging, sys
from pathlib import Path
from kurtail_pl.storage.lock import alone_with
logging.getLogger("kurtail_pl").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("kurtail_pl").setLevel(logging.INFO)
print("ready", flush=True)
sys.stdin.readline()
with alone_with(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def workers(tmp_path: Path) -> list[subprocess.Popen[str]]:
    """Three processes that take a lock when they read a line, and give it back when they read another."""
    found = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    for worker in found:
        assert said(worker) == "ready"
    return found


def said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def test_the_second_waits_for_the_first_whether_it_ends_or_is_killed(
    workers: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    first, second, third = workers
    go(first)
    assert said(first) == "mine"
    go(second)
    assert said(second).startswith(f"waiting for process {first.pid} on ")
    go(first)
    assert said(second) == "mine"
    go(third)
    assert said(third).startswith(f"waiting for process {second.pid} on ")
    os.kill(second.pid, signal.SIGKILL)
    assert said(third) == "mine"
    go(third)
    assert [worker.wait() for worker in workers] == [0, -signal.SIGKILL, 0]
    assert list(tmp_path.iterdir()) == []
    for worker in workers:
        worker.communicate()


def test_a_holder_may_take_its_lock_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with alone_with(tmp_path / "work"):
        with alone_with(tmp_path / "sub" / ".." / "work"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".work.lock"]
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NotWritable, match=r"/file cannot be written: File exists"),
        alone_with(tmp_path / "file" / "work"),
    ):
        pass
