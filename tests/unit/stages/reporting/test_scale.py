"""Axes: where numbers are, and what is written beside them."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kurtail_pl.stages.reporting.page.scale import Scale, scale_of

NUMBERS = st.lists(st.floats(-1e300, 1e300, allow_nan=False), min_size=1, max_size=8)


def test_equal_ways_are_equal_sums_or_equal_factors() -> None:
    assert [Scale(2, 10).at(value) for value in (2, 4, 10)] == pytest.approx([0, 0.25, 1])
    assert [Scale(1, 1000, log=True).at(value) for value in (1, 10, 1000)] == pytest.approx([0, 1 / 3, 1])


def test_ticks_are_round() -> None:
    assert Scale(0, 61).ticks() == [0, 20, 40, 60]
    assert Scale(0, 0.5).ticks() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert Scale(1.7, 230, log=True).ticks() == pytest.approx([10, 100])
    assert Scale(1.5, 9, log=True).ticks() == pytest.approx([2, 5])


@given(NUMBERS)
@example([1.0, 4e293])  # The room beyond the last would be infinity.
def test_all_numbers_are_on_their_axis_in_their_order(values: list[float]) -> None:
    scale = scale_of(values)
    places = [scale.at(value) for value in sorted(values)]
    assert all(0 <= place <= 1 for place in places)
    assert places == sorted(places)
    ticks = scale.ticks()
    assert len(ticks) <= 12
    assert all(scale.low <= tick <= scale.high and math.isfinite(tick) for tick in ticks)
