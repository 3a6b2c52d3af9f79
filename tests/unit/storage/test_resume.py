"""Unfinished folders: what is kept, what is removed, what is refused."""

import contextlib
from pathlib import Path

import pytest

from kurtail_pl.errors import ArtefactError, ConfigError, DiskFull, ResumeMismatch
from kurtail_pl.storage.resume import differences, resumable_folder, resumable_work

RECIPE = {"model": "a", "text": {"windows": 3, "seqlen": 8}}


def leave(folder: Path, error: type[BaseException]) -> None:
    """Two layers finished, a file of each written, then an error."""
    with resumable_folder(folder, False, RECIPE) as work:
        for layer in range(2):
            (work.folder / f"layer{layer}").write_text("kept")
            work.state["notes"] = [layer]
            work.finished(layer + 1)
        raise error("stop")


def interrupted(folder: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        leave(folder, error)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, DiskFull])
def test_unfinished_work_is_taken_up(tmp_path: Path, error: type[BaseException]) -> None:
    interrupted(tmp_path / "out", error)
    assert not (tmp_path / "out").exists()
    with resumable_folder(tmp_path / "out", False, RECIPE) as work:
        assert (work.done, work.state) == (2, {"notes": [1]})
        assert (work.folder / "layer1").read_text() == "kept"
        (work.scratch / "states").write_text("gone")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layer0", "layer1"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_of_the_users_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", ConfigError)
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_is_refused_or_replaces(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt)
    other = {"model": "b", "text": {"windows": 4, "seqlen": 8}}
    with (
        pytest.raises(ResumeMismatch, match=r"model is 'a', wanted 'b'; text.windows is 3, wanted 4"),
        resumable_folder(tmp_path / "out", False, other),
    ):
        pass
    with resumable_folder(tmp_path / "out", True, other) as work:
        assert work.done is None
        assert [path.name for path in work.folder.iterdir()] == ["unfinished"]
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_not_touched_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ArtefactError, match="exists"), resumable_folder(tmp_path / "out", False, RECIPE):
        pass
    with resumable_folder(tmp_path / "out", True, RECIPE) as work:
        (work.folder / "new").write_text("new")
        assert (tmp_path / "out" / "old").read_text() == "old"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_work_without_a_folder_lives_in_the_cache(cache: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), resumable_work(RECIPE) as work:
        work.finished(1)
        raise KeyboardInterrupt
    with resumable_work({**RECIPE, "model": "b"}) as other:
        assert other.done is None
    with resumable_work(RECIPE) as work:
        assert work.done == 1
        assert cache in work.folder.parents
    assert list((cache / "work").iterdir()) == []


def test_differences_go_into_nested_settings() -> None:
    have, wanted = {"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [1, 2], "d": 2}, "e": None, "f": 0}
    assert differences(have, wanted) == ["b.c is [1], wanted [1, 2]", "f is None, wanted 0"]
    assert differences(have, have) == []


def test_settings_of_any_name_are_named_in_one_short_line() -> None:
    (found,) = differences({"a\u001c\x97" + "b" * 300: 1}, {})
    assert found.isprintable()
    assert len(found) < 160
