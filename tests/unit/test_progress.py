"""Where a plan of steps stands: the time that is left, by a clock of the test's own."""

import logging

import pytest

from kurtail_pl.progress import Step, Steps, shown, track

PLAN = [
    Step("a", "fold", "fold layers", 10.0),
    Step("a", "round", "round layers", 20.0),
    Step("b", "fold", "fold layers", 10.0),
    Step("b", "round", "round layers", 40.0),
]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def steps(clock: Clock) -> Steps:
    return Steps(PLAN, clock)


def test_before_anything_is_done_the_plan_is_believed(steps: Steps) -> None:
    assert steps.seconds_left() == 80
    assert str(steps) == "step 1 of 4: a: fold, about 1 min left"


def test_what_is_left_is_rescaled_by_the_same_work_and_else_by_all_work(steps: Steps, clock: Clock) -> None:
    steps.reached("fold layers", 1, 4)
    clock.now += 5  # A quarter of ten seconds took five: this work takes twice as long as planned.
    assert steps.seconds_left() == 15 + 40 + 20 + 80
    clock.now += 15
    steps.reached("round layers", 0, 2)
    assert steps.seconds_left() == 40 + 20 + 80
    steps.reached("round layers", 1, 2)
    clock.now += 5  # Half of twenty seconds: half as long as planned.
    assert steps.seconds_left() == 5 + 20 + 20
    assert steps.share() == 25 / (25 + 45)


def test_skipped_steps_are_not_waited_for_and_none_is_gone_back_to(steps: Steps) -> None:
    steps.begin("b")
    assert steps.seconds_left() == 50
    steps.reached("round layers", 0, 2)
    assert steps.seconds_left() == 40
    steps.begin("a")
    steps.reached("drawing", 1, 2)  # Work that no step is for.
    assert str(steps) == "step 4 of 4: b: round, under 1 min left"
    steps.reached("round layers", 1, 1)
    assert steps.seconds_left() == 0


def test_loops_tell_the_plan_that_is_shown(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("kurtail_pl")
    with pytest.MonkeyPatch.context() as patch:
        # Tests that ran a command left its own log, which caplog would listen to twice.
        patch.setattr(log, "propagate", True)
        patch.setattr(log, "handlers", [])
        caplog.set_level(logging.INFO, "kurtail_pl")
        with shown(steps):
            assert list(track([3, 4], "fold layers")) == [3, 4]
            assert list(track([5], "drawing")) == [5]
            steps.begin("b")
            assert list(track([], "round layers")) == []
        assert list(track([6], "fold layers")) == [6]
    lines = [message.partition(",")[0] for message in caplog.messages]
    assert lines == [
        "step 1 of 4: a: fold",
        "step 3 of 4: b: fold",
        "step 4 of 4: b: round",
        "fold layers: 1/1 after 0 s",
    ]
