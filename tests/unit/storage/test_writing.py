"""What Python, safetensors, tokenizers and torch say when the system refuses them a file becomes an error of ours."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from kurtail_pl.errors import NotWritable
from kurtail_pl.storage.writing import disk_errors_are_ours

WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_text("a" * 10_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(3)}, path),
    "tokenizers": lambda path: Tokenizer(models.BPE()).save(str(path)),
    "torch": lambda path: torch.from_file(str(path), shared=True, size=3, dtype=torch.float32),
}


@contextmanager
def no_more_files() -> Iterator[None]:
    """None can be opened but those that are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_too_many_open_files(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "before")  # What a library imports at its first use is a file too.
    file, said = tmp_path / "file", "file cannot be written: Too many open files"
    with pytest.raises(NotWritable, match=said), no_more_files(), disk_errors_are_ours(file):
        WRITERS[name](file)


def test_what_is_not_the_systems_word_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="28"), disk_errors_are_ours(Path("folder")):
        raise RuntimeError("a matrix of another shape (28)")
