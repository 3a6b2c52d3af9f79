"""What a target is."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz.samples import Samples
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        inputs_in_ci: how many are tried there.
        inputs: contents of the file.
        read: puts the content there and does what the verbs do with it.
    """

    inputs_in_ci: int
    inputs: SearchStrategy[bytes]
    read: Callable[[bytes], object]


Make = Callable[[Samples, Path], Target]
TARGETS: dict[str, Make] = {}
"""Name -> what makes a target of the samples and an empty folder."""


def target(make: Make) -> Make:
    TARGETS[make.__name__] = make
    return make


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / folder.name))
