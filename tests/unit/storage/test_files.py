"""Whole folders and files or none; hashes; room on the disk."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kurtail_pl.errors import ArtefactError, DiskFull, NotFinite
from kurtail_pl.storage import files


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_new(folder: Path, overwrite: bool, text: str) -> None:
    with files.new_folder(folder, overwrite) as partial:
        assert partial.parent == folder.parent  # a rename, not a copy from another disk
        (partial / "sub").mkdir()
        (partial / "sub" / "new").write_text(text)


@pytest.mark.parametrize("before", ["nothing", "empty folder"])
def test_a_new_folder_appears_whole(tmp_path: Path, before: str) -> None:
    folder = tmp_path / "deep" / "artefact"
    if before == "empty folder":
        folder.mkdir(parents=True)
    write_new(folder, overwrite=False, text="all")
    assert content(folder) == {"sub/new": "all"}
    assert [p.name for p in folder.parent.iterdir()] == ["artefact"]


def test_the_folder_is_not_there_before_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    with files.new_folder(folder, overwrite=False) as partial:
        (partial / "file").write_text("x")
        assert not folder.exists()
    assert content(folder) == {"file": "x"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_leaves_what_was_there(tmp_path: Path, old: bool, error: type[BaseException]) -> None:
    folder = tmp_path / "artefact"
    if old:
        folder.mkdir()
        (folder / "old").write_text("kept")

    def fail() -> None:
        with files.new_folder(folder, overwrite=True) as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert content(tmp_path) == ({"artefact/old": "kept"} if old else {})
    assert sorted(p.name for p in tmp_path.iterdir()) == (["artefact"] if old else [])


def test_overwriting_leaves_nothing_of_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "old").write_text("gone")
    write_new(folder, overwrite=True, text="all")
    assert content(folder) == {"sub/new": "all"}


def test_remains_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    stale = tmp_path / ".artefact.partial"
    stale.mkdir()
    (stale / "stale").write_text("x")
    write_new(tmp_path / "artefact", overwrite=False, text="all")
    assert content(tmp_path) == {"artefact/sub/new": "all"}


def test_existing_content_is_refused_and_stands(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "old").write_text("kept")
    with pytest.raises(ArtefactError, match=r"artefact exists; pass --overwrite"):
        write_new(folder, overwrite=False, text="all")
    assert content(tmp_path) == {"artefact/old": "kept"}
    files.refuse_existing(folder, overwrite=True)
    files.refuse_existing(tmp_path / "none", overwrite=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "artefact").write_text("a file")
    with pytest.raises(ArtefactError, match="is a file"):
        write_new(tmp_path / "artefact", overwrite, text="all")
    assert (tmp_path / "artefact").read_text() == "a file"


def test_room_on_the_disk(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet" / "there", 1000)
    assert not (tmp_path / "not").exists()
    total = shutil.disk_usage(tmp_path).total
    with pytest.raises(DiskFull, match=r"needs 1000000000.00 GB and its disk has"):
        files.require_space(tmp_path / "not" / "yet", 10**18)
    with pytest.raises(DiskFull):
        files.require_space(tmp_path, total + 1)


def test_json_round_trip(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None], "b": {"c": "größer"}, "d": 1e-30}
    path = tmp_path / "data.json"
    path.write_text("old")
    files.write_json(path, data)
    assert json.loads(path.read_text(encoding="utf-8")) == data
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        files.write_json(path, {"a": {1, 2}})
    assert path.read_text() == "old"


def test_text_round_trip(tmp_path: Path) -> None:
    files.write_text(tmp_path / "page.md", "größer\n")
    assert (tmp_path / "page.md").read_bytes() == "größer\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]


def test_tensors_round_trip_even_when_not_contiguous(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    files.write_tensors(tmp_path / "t.safetensors", {"whole": matrix, "turned": matrix.T}, metadata=("kind", "test"))
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["whole"], matrix)
    assert torch.equal(loaded["turned"], matrix.T)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("age", [0, 3600])
def test_hashes(tmp_path: Path, age: int) -> None:
    """Also of a file that was hashed before, and is changed in place to another as long."""
    path = tmp_path / "f"
    path.write_bytes(b"abc" * 100_000)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    for _ in range(2):
        assert files.sha256_of(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with path.open("r+b") as file:
        file.write(b"abd")
    for _ in range(2):
        assert files.sha256_of(path) == hashlib.sha256(b"abd" + b"abc" * 99_999).hexdigest()


def test_the_hash_of_a_text_is_that_of_its_utf8() -> None:
    assert files.sha256_of_text("größer") == hashlib.sha256("größer".encode()).hexdigest()


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MB"), (12_500_000, "12.5 MB"), (99_999_999, "100.0 MB"), (1.25e9, "1.25 GB")]
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert files.gigabytes(size) == text


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KURTAIL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "kurtail"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "kurtail"
    monkeypatch.setenv("KURTAIL_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("stands", ["new", "old"])
def test_what_a_process_killed_between_two_renames_left_is_mended(tmp_path: Path, stands: str) -> None:
    """It was killed before the new folder had the name, or before the old one was removed."""
    (tmp_path / ".artefact.old").mkdir()
    (tmp_path / ".artefact.old" / "file").write_text("old")
    if stands == "new":
        (tmp_path / "artefact").mkdir()
        (tmp_path / "artefact" / "file").write_text("new")
    with pytest.raises(ArtefactError, match="exists"):
        write_new(tmp_path / "artefact", overwrite=False, text="all")
    assert content(tmp_path) == {"artefact/file": stands}


KILLED_WRITER = """
import resource, signal, torch
from pathlib import Path
from kurtail_pl.storage.files import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_tensors(Path("t.safetensors"), {"a": torch.ones(1000)})
"""
"""The system kills the process in the middle of the file."""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
def test_what_a_killed_writer_of_tensors_left_is_cleared(tmp_path: Path) -> None:
    """safetensors writes under a random name, which nobody would find again."""
    paths = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER], cwd=tmp_path, env=paths)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path for path in tmp_path.rglob("*") if path.is_file()] != []
    assert not (tmp_path / "t.safetensors").exists()
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1000)})
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_tensors_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    tensors = {"first": torch.ones(3), "second": torch.tensor([1.0, math.nan])}
    with pytest.raises(NotFinite, match=r"second of .*t\.safetensors"):
        files.write_tensors(tmp_path / "t.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_not_written(tmp_path: Path, value: float) -> None:
    """JSON has no such numbers; Python's own writer makes some up."""
    with pytest.raises(NotFinite, match=r"cost\.parts\.1\.seconds of .*a\.json"):
        files.write_json(tmp_path / "a.json", {"cost": {"parts": [{"seconds": 1.0}, {"seconds": value}]}})
    assert list(tmp_path.iterdir()) == []


def test_who_may_read_other_files_may_read_tensors(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_lock_of_who_was_killed_at_the_end_goes(tmp_path: Path) -> None:
    write_new(tmp_path / "artefact", overwrite=False, text="all")
    (tmp_path / ".artefact.lock").touch()
    with pytest.raises(ArtefactError, match="exists; pass --overwrite"):
        files.refuse_finished(tmp_path / "artefact", overwrite=False)
    files.refuse_finished(tmp_path / "artefact", overwrite=True)
    files.refuse_finished(tmp_path / "nowhere" / "other", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]
