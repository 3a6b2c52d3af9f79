"""Hidden states in memory-mapped files."""

import math
from pathlib import Path

import pytest
import torch

from kurtail_pl.errors import NotFinite
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.hidden import HiddenStates, MappedStates

SHAPE = (3, 4, 5)


def states(seed: int) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_are_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    first = MappedStates(tmp_path / "a", SHAPE, dtype)
    first.fill(states(0))
    first[1] = states(1)[0]
    assert (tmp_path / "a").stat().st_size == 60 * dtype.itemsize
    expected = [states(0)[0], states(1)[0], states(0)[2]]
    again = MappedStates(tmp_path / "a", SHAPE, dtype)
    assert len(again) == 3
    for found, wanted in zip(again, expected, strict=True):
        assert torch.equal(found, wanted.to(dtype))


def test_a_file_of_another_size_is_made_anew(tmp_path: Path) -> None:
    MappedStates(tmp_path / "a", SHAPE, torch.float32).fill(states(0))
    wider = MappedStates(tmp_path / "a", (3, 4, 6), torch.float32)
    assert all(torch.equal(found, torch.zeros(1, 4, 6)) for found in wider)


def test_no_windows_need_no_file(tmp_path: Path) -> None:
    none = MappedStates(tmp_path / "a", (0, 0, 5), torch.float32)
    assert list(none) == []
    assert not (tmp_path / "a").exists()


def test_layers_read_what_the_one_before_wrote(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", False, {}) as work:
        hidden = HiddenStates(work, SHAPE, torch.float32)
        hidden.before.fill(states(0))
        work.finished(0)
        for layer in range(3):
            hidden.after.fill(x + 1 for x in hidden.before)
            work.finished(layer + 1)
        for found, start in zip(hidden.before, states(0), strict=True):
            torch.testing.assert_close(found, start + 3)
        taken_up = HiddenStates(work, SHAPE, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(taken_up.before, hidden.before, strict=True))
        assert hidden.scratch(7)[0].shape == (1, 4, 7)
    assert list((tmp_path / "out").iterdir()) == []


def test_states_beside_start_where_the_others_do_and_go_their_own_way(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", False, {}) as work:
        hidden = HiddenStates(work, SHAPE, torch.float32)
        hidden.before.fill(states(0))
        work.finished(0)
        for _ in range(2):  # Killed in the first layer, and taken up.
            beside = hidden.beside("other")
            assert all(torch.equal(a, b) for a, b in zip(beside.before, states(0), strict=True))
            hidden.after.fill(x + 1 for x in hidden.before)
            beside.after.fill(x + 2 for x in beside.before)
        work.finished(1)
        for found, start in zip(hidden.beside("other").before, states(0), strict=True):
            torch.testing.assert_close(found, start + 2)
        for found, start in zip(hidden.before, states(0), strict=True):
            torch.testing.assert_close(found, start + 1)


@pytest.mark.parametrize("done", [None, 0, 2])
def test_states_that_are_no_numbers_are_refused_where_they_are_made(tmp_path: Path, done: int | None) -> None:
    where = "the embedding" if done is None else f"decoder layer {done}"
    bad = states(0)
    bad[1][0, 2, 3] = math.inf
    with resumable_folder(tmp_path / "out", False, {}) as work:
        hidden = HiddenStates(work, SHAPE, torch.float32)
        if done is not None:
            work.finished(done)
        for of in (hidden.after, hidden.scratch(5)):
            with pytest.raises(NotFinite, match=rf"window 1 .* {where} .*float32"):
                of.fill(bad)
