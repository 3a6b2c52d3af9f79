"""What a target is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutations import json_files
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


def json_target(inputs_in_ci: int, file: Path, use: Callable[[], object]) -> Target:
    """A target of a JSON file that is whole now: each input is put in its place, and used."""

    def read(content: bytes) -> None:
        file.write_bytes(content)
        use()

    return Target(inputs_in_ci, json_files(json.loads(file.read_text())), read)
