"""What is fuzzed: for each kind of file, inputs of that kind and what the verbs do with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz.mutations import json_files, tensor_files
from fuzz.samples import Samples
from hypothesis.strategies import SearchStrategy
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.generate import Sampling, generate
from kurtail_onnx.run.session import open_session

from kurtail_pl.storage.activations import ActivationStore


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


@target
def manifest(samples: Samples, place: Path) -> Target:
    store = copied(samples.store, place)
    file = store / "manifest.json"
    valid = json.loads(file.read_text())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        opened = ActivationStore(store)
        opened.require_intact()
        opened.read("layer000.value", 0, opened.origin.rows)

    return Target(1000, json_files(valid), read)


@target
def store_rows(samples: Samples, place: Path) -> Target:
    store = copied(samples.store, place)
    file = store / "layer000.value.safetensors"
    opened = ActivationStore(store)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        opened.read("layer000.value", 0, 12)

    return Target(1000, tensor_files(file.read_bytes()), read)


@target
def description(samples: Samples, place: Path) -> Target:
    folder = copied(samples.exported, place)
    file = folder / "kurtail_export.json"
    session = open_session(folder / "model.onnx", threads=1)
    valid = json.loads(file.read_text())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        opened = Export(folder)
        opened.tokenizer()
        next(generate(Decoder(opened, session), np.array([[5, 7]]), Sampling(1)))

    return Target(1000, json_files(valid), read)
