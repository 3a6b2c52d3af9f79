"""Files that kurtail wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from fuzz.mutations import as_json, json_files, tensor_files
from fuzz.registry import Target, copied, json_target, target
from fuzz.samples import Samples
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.generate import Sampling, generate
from kurtail_onnx.run.session import open_session

from kurtail_pl.artefact.load import load
from kurtail_pl.stages.reporting.page.model import write_curves
from kurtail_pl.stages.reporting.report import report
from kurtail_pl.storage.activations import ActivationStore, Origin
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.storage.rotation_file import hash_of, read_rotations


@target
def card(samples: Samples, place: Path) -> Target:
    folder = copied(samples.artefact, place)
    file = folder / "kurtail.json"

    def use() -> None:
        load(folder)
        report(folder)

    return json_target(1000, file, use)


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

    def use() -> None:
        report(folder)

    return json_target(1500, file, use)


@target
def training(samples: Samples, place: Path) -> Target:
    """Curves, to the page."""
    folder = copied(samples.artefact, place)
    write_curves(folder, [1, 2], {"loss/total": [2.0, 1.0], "kurtosis/r1/mean": [4.0, 3.0]})
    return json_target(400, folder / "training.json", lambda: report(folder))


@target
def drawn(samples: Samples, place: Path) -> Target:
    """Numbers of figures, to the page."""
    folder = copied(samples.artefact, place)
    (folder / "figures").mkdir()
    numbers = {"vanilla": [[9.0, 8.0], [7.0, 6.0]], "quarot": [[2.0, 3.0], [2.0, 3.0]]}
    surface = {"vanilla": [[1.0, 8.0], [2.0, 9.0]], "quarot": [[1.0, 2.0], [2.0, 1.0]]}
    file = folder / "figures" / "figures.json"
    summary = {"kurtosis": numbers, "rounding_error": numbers, "layer001.ffn_in": {"surface": surface}}
    file.write_text(json.dumps(summary))
    return json_target(400, file, lambda: report(folder))


@target
def rotations(samples: Samples, place: Path) -> Target:
    file = place / "rotations.safetensors"
    valid = (samples.fused / "rotations.safetensors").read_bytes()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        hash_of(read_rotations(file))

    return Target(1500, tensor_files(valid), read)


@target
def rotations_metadata(samples: Samples, place: Path) -> Target:
    """The description within the header, JSON in JSON."""
    file = place / "rotations.safetensors"
    valid = (samples.fused / "rotations.safetensors").read_bytes()
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])
    description = json.loads(header["__metadata__"]["rotations"])

    def read(content: bytes) -> None:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return
        new = json.dumps({**header, "__metadata__": {"rotations": text}}).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + valid[8 + size :])
        hash_of(read_rotations(file))

    return Target(1500, json_files(description), read)


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

    return Target(1500, json_files(valid), read)


@target
def store_rows(samples: Samples, place: Path) -> Target:
    store = copied(samples.store, place)
    file = store / "layer000.value.safetensors"
    opened = ActivationStore(store)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        opened.read("layer000.value", 0, 12)

    return Target(1500, tensor_files(file.read_bytes()), read)


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

    return Target(1500, json_files(valid), read)


@target
def description(samples: Samples, place: Path) -> Target:
    folder = copied(samples.exported, place)
    file = folder / "kurtail_export.json"
    session = open_session(folder / "model.onnx", threads=1)

    def use() -> None:
        opened = Export(folder)
        opened.tokenizer()
        next(generate(Decoder(opened, session), np.array([[5, 7]]), Sampling(1)))

    return json_target(1000, file, use)
