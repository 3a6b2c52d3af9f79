"""Whatever a file holds, reading it ends in a result or in one of our errors.

`KURTAIL_FUZZ_SECONDS=3600 pytest tests/fuzz -s` tries new inputs for that long and lists all that it finds.
"""

import os
import random
import sys
import time
from collections import Counter
from itertools import count
from typing import Any

import pytest
from fuzz.outcomes import Finding, little_memory, outcome
from fuzz.samples import Samples
from fuzz.targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS = float(os.environ.get("KURTAIL_FUZZ_SECONDS", 0))
COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    # A few edits of something valid are small enough: making them smaller would take minutes.
    "phases": [Phase.generate],
}


@pytest.fixture
def target(
    request: pytest.FixtureRequest,
    samples: Samples,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Target:
    # Not `tmp_path`: it has the test's long name, and would take a third of a message's length, more in a worker.
    root = tmp_path_factory.mktemp("f")
    monkeypatch.setenv("KURTAIL_CACHE", str(root / "cache"))
    (root / "f").mkdir()
    return TARGETS[request.param](samples, root / "f")


@pytest.mark.skipif(SECONDS > 0, reason="new inputs are tried instead")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's calls.
@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # Of an input that failed, which is then shown.
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_every_input_ends_in_a_result_or_in_one_of_our_errors(target: Target) -> None:
    @settings(max_examples=target.inputs_in_ci, derandomize=True, **COMMON)
    @given(target.inputs)
    def run(content: bytes) -> None:
        outcome(lambda: target.read(content))

    with little_memory():
        run()


@pytest.mark.skipif(SECONDS == 0, reason="KURTAIL_FUZZ_SECONDS is not set")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's calls.
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_new_inputs(target: Target, request: pytest.FixtureRequest) -> None:
    """Each kind of file gets its share of the seconds; findings are collected, not made small."""
    outcomes: Counter[str] = Counter()
    findings: dict[str, str] = {}

    @settings(max_examples=200, **COMMON)
    @given(target.inputs)
    def run(content: bytes) -> None:
        try:
            outcomes[outcome(lambda: target.read(content))] += 1
        except Finding as finding:
            outcomes["finding"] += 1
            findings.setdefault(finding.kind, f"{finding}\n{content[:2000]!r}")

    end = time.monotonic() + SECONDS / len(TARGETS)
    with little_memory():
        for _ in count():
            seed(random.getrandbits(64))(run)()
            if time.monotonic() > end:
                break
    sys.stdout.write(f"\n{request.node.callspec.id}: {outcomes.total()} inputs, {dict(outcomes)}\n")
    assert not findings, "\n\n".join(findings.values())
