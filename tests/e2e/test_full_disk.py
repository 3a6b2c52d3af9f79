"""A disk that fills up while a stage writes: a clear error, what was finished stays, and the work goes on."""

import contextlib
import gc
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kurtail_pl.artefact import shards as writing

Kurtail = Callable[..., None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    gc.collect()  # An error holds the frames that it came through, and they the files that they mapped.
    subprocess.run(["umount", disk], check=True)


def fill_up(ballast: Path) -> None:
    """Write a file until there is no room left."""
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
            file.flush()


def card_of(folder: Path) -> dict[str, object]:
    card: dict[str, object] = json.loads((folder / "kurtail.json").read_text())
    card.pop("cost")
    return card


def test_what_was_finished_is_kept_and_the_work_goes_on(
    kurtail: Kurtail, tied: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is taken up while the second layer is written; asking for room before the work cannot see that."""
    fuse = ["fuse", "--model", tied, "--method", "quarot", "--out"]
    kurtail(tmp_path, *fuse, tmp_path / "undisturbed")
    ballast, partial = small_disk / "ballast", small_disk / ".out.partial"

    def fill(path: Path, tensors: object, *rest: object) -> None:
        if path.name.startswith("part-00002") and not ballast.exists():
            fill_up(ballast)
        write(path, tensors, *rest)  # type: ignore[arg-type]

    write = writing.write_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", fill)
        with pytest.raises(SystemExit):
            kurtail(small_disk, *fuse, small_disk / "out")
    assert "the disk is full" in capsys.readouterr().err
    assert not (small_disk / "out").exists()
    parts = sorted(partial.rglob("part-*.safetensors"))
    assert [path.stem for path in parts] == ["part-00000", "part-00001"]
    assert all(load_file(path) for path in parts)
    ballast.unlink()
    kurtail(small_disk, *fuse, small_disk / "out")
    assert "going on after 1 finished parts" in capsys.readouterr().err
    assert card_of(small_disk / "out") == card_of(tmp_path / "undisturbed")


def test_a_disk_too_small_is_refused_before_the_work(
    kurtail: Kurtail, tied: Path, text_file: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--spec.text.source", text_file, "--spec.text.windows", 100, "--spec.text.seqlen", 64]
    with pytest.raises(SystemExit):
        kurtail(small_disk, "capture", "--spec.model", tied, *text, "--spec.rows", 6000, "--out", small_disk / "s")
    assert "free some space" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


def test_an_export_that_fills_the_disk_leaves_nothing(
    kurtail: Kurtail, tied: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = pytest.importorskip("kurtail_onnx.write")
    kurtail(tmp_path, "fuse", "--model", tied, "--method", "quarot", "--out", "fused")
    kurtail(tmp_path, "quantize", "--artefact", "fused", "--spec.rounder", "RTN", "--out", "artefact")
    save = write.save

    def full(*arguments: object) -> None:
        fill_up(small_disk / "ballast")
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "save", full)
        with pytest.raises(SystemExit):
            kurtail(small_disk, "export", "--artefact", tmp_path / "artefact", "--out", small_disk / "onnx")
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
