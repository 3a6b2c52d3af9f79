"""What is fuzzed: for each kind of file, inputs of that kind and what the verbs do with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from families import fill
from fuzz.mutations import as_json, damaged, foreign, json_files, tensor_files
from fuzz.samples import CONFIG, Samples
from gguf_files import write_gguf
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.generate import Sampling, generate
from kurtail_onnx.run.session import open_session
from transformers import LlamaForCausalLM

from kurtail_pl.stages.artefact import load
from kurtail_pl.stages.evaluate import perplexity
from kurtail_pl.stages.report import report
from kurtail_pl.storage.activations import ActivationStore, Origin
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.storage.sources import open_model


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
    origin = Origin(**valid["origin"])

    def read(content: bytes) -> None:
        file.write_bytes(content)
        opened = ActivationStore(store)
        opened.require_intact()
        opened.read("layer000.value", 0, opened.origin.rows)
        opened.require_origin(origin)

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


@target
def index(samples: Samples, place: Path) -> Target:
    model = copied(samples.sharded, place)
    file = model / "model.safetensors.index.json"
    valid = json.loads(file.read_text())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        checkpoint = Checkpoint(model)
        assert checkpoint.size > 0
        for name in checkpoint.names:
            checkpoint.dtype(name)
            checkpoint.tensor(name)
        perplexity(checkpoint, samples.spec)

    return Target(1000, json_files(valid), read)


@target
def weights(samples: Samples, place: Path) -> Target:
    model = copied(samples.model, place)
    file = model / "model.safetensors"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        perplexity(Checkpoint(model), samples.spec)

    return Target(1000, tensor_files(file.read_bytes()), read)


@target
def card(samples: Samples, place: Path) -> Target:
    folder = copied(samples.artefact, place)
    file = folder / "kurtail.json"
    valid = json.loads(file.read_text())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        load(folder)
        report(folder)

    return Target(1000, json_files(valid), read)


@target
def clips(samples: Samples, place: Path) -> Target:
    folder = copied(samples.artefact, place)
    file = folder / "kurtail.json"
    valid = json.loads(file.read_text())
    valid["clips"] = [{"self_attn.q_proj.activations": 0.8, "self_attn.keys": 0.9}] * 2
    small = {key: valid[key] for key in ("scheme", "clips")}

    def read(content: bytes) -> None:
        try:
            new = json.loads(content)
        except (ValueError, RecursionError):
            return
        file.write_bytes(as_json({**valid, **new} if isinstance(new, dict) else new))
        model = load(folder)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))

    return Target(1000, json_files(small), read)


@target
def results(samples: Samples, place: Path) -> Target:
    folder = copied(samples.artefact, place)
    file = folder / "results.json"
    valid = json.loads(file.read_text())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        report(folder)

    return Target(1000, json_files(valid), read)


@target
def progress(samples: Samples, place: Path) -> Target:
    recipe = {"model": "a", "text": {"windows": 3}}
    wanted = place / "out"
    kept = place / ".out.partial" / "unfinished"
    valid = {"recipe": recipe, "processes": 1, "done": 2, "state": {"cost": {"seconds": 1.0}, "notes": [1]}}

    def read(content: bytes) -> None:
        shutil.rmtree(wanted, ignore_errors=True)
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "progress.json").write_bytes(content)
        with resumable_folder(wanted, False, recipe) as work:
            work.finished(3)

    return Target(1000, json_files(valid), read)


@target
def gguf(samples: Samples, place: Path) -> Target:
    file = write_gguf(place / "little.gguf", fill(LlamaForCausalLM(CONFIG)))
    valid = file.read_bytes()
    start = len(valid) - sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters()) * 4

    def read(content: bytes) -> None:
        file.write_bytes(content)
        shutil.rmtree(place.parent / "cache", ignore_errors=True)
        perplexity(open_model(str(file)), samples.spec)

    return Target(1000, st.one_of(damaged(valid, within=start), foreign()), read)
