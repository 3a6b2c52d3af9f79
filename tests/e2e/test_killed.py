"""Stages killed at random moments (SIGKILL) and run again: the same bytes as undisturbed."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kurtail_pl.storage.resume import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
ARTEFACT = Path("artifacts") / "tied-kurtail-w4a4kv4"
READY = """
import sys, kurtail_pl.cli.verbs, kurtail_pl.cli.trainer
from kurtail_pl.cli.main import main
print("ready", flush=True)
sys.stdin.readline()
main()
"""


def hashes(folder: Path) -> dict[str, Any]:
    """What was made, without what it cost."""
    if (folder / "manifest.json").is_file():
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest
    card: dict[str, Any] = json.loads((folder / "kurtail.json").read_text())
    card.pop("cost")
    return card


def is_finished(place: Path) -> bool:
    """Whether a `fit` wrote all there is, and would refuse to replace it; it may have been killed on its way out."""
    return all((place / ARTEFACT / name).is_file() for name in ("results.json", "report.md", "README.md"))


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Let a process begin its work, kill it after a while; whether it was still at work."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    time.sleep(seconds)
    alive = process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


@pytest.mark.parametrize("stage", ["capture", "fuse", "gptq"])
def test_killed_and_run_again(
    stage: str, kurtail: Kurtail, start: Callable[..., Any], tied: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ["--spec.text.source", text_file, "--spec.text.windows", 60, "--spec.text.seqlen", 64]
    kurtail(tmp_path, "fuse", "--model", tied, "--method", "quarot", "--out", "input")
    verb, where = {
        "capture": (["capture", "--spec.model", tied, *text, "--spec.rows", "all"], "--out"),
        "fuse": (["fuse", "--model", tied, "--method", "quarot"], "--out"),
        "gptq": (["quantize", "--artefact", "input", "--spec.rounder", "GPTQ", *text], "--out"),
    }[stage]
    began = time.monotonic()
    kurtail(tmp_path, *verb, where, "undisturbed")
    seconds = time.monotonic() - began
    draw, kills = random.Random(stage), 0
    while kills < 2:
        process = start(tmp_path, *verb, where, "killed", program=("-c", READY))
        if kill_after(process, draw.uniform(0.1, 0.7) * seconds):
            kills += 1
        elif kills:
            break  # The rest of the work was shorter than the wait.
        else:
            seconds /= 2  # This machine was busier before.
            shutil.rmtree(tmp_path / "killed")
    if not (tmp_path / "killed").exists():
        kurtail(tmp_path, *verb, where, "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*.partial"))


def test_fit_killed_and_run_again(kurtail: Kurtail, start: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    """The whole road: capture, learning, fusion, GPTQ or evaluation, whatever the moment hits."""
    steps = ["--data.init_args.steps", 60]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    began = time.monotonic()
    kurtail(undisturbed, "fit", "--config", recipe, *steps)
    seconds = time.monotonic() - began
    draw = random.Random(3)
    for _ in range(4):
        process = start(tmp_path, "fit", "--config", recipe, *steps, program=("-c", READY))
        kill_after(process, draw.uniform(0.2, 0.6) * seconds)
        if is_finished(tmp_path):
            break
    else:
        kurtail(tmp_path, "fit", "--config", recipe, *steps)
    require_same_run(tmp_path, undisturbed)


def require_same_run(made: Path, undisturbed: Path) -> None:
    """Rotations and artefact bit by bit, but for what they cost."""
    cards = [hashes(place / ARTEFACT) for place in (made, undisturbed)]
    for card in cards:  # What it cost stands with the rotations, and so in their file's hash.
        card["rotations"].pop("cost")
        for name in ("rotations_sha256", "fused_sha256"):
            card.pop(name)
        card["sha256"].pop("rotations.safetensors")
    assert differences(*cards) == []
    tensors = [load_file(place / ARTEFACT / "rotations.safetensors") for place in (made, undisturbed)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    results = [json.loads((place / ARTEFACT / "results.json").read_text()) for place in (made, undisturbed)]
    assert results[0]["evaluation"] == results[1]["evaluation"]
    assert results[0]["kurtosis"] == results[1]["kurtosis"]


@pytest.mark.slow
def test_two_processes_killed_and_run_again(
    start: Callable[..., subprocess.Popen[str]], recipe: Path, tmp_path: Path
) -> None:
    """A `fit` that two processes share, both killed at once, whatever they were at, until a run is left alone."""
    both = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    fit = ["fit", "--config", recipe, "--data.init_args.steps", 60, *both]

    def run(place: Path, seconds: float = 240.0) -> float:
        """How long it was at work, until it was killed after so many seconds."""
        place.mkdir(exist_ok=True)
        process = start(place, *fit, process_group=0)
        assert process.stderr is not None
        # The work begins with the store: captured, or reused.
        before = list(itertools.takewhile(lambda line: "store" not in line, process.stderr))
        began = time.monotonic()
        try:
            _, messages = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0, (before, messages)
        return time.monotonic() - began

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    seconds, draw = run(undisturbed), random.Random(1)
    for wait in [draw.uniform(0, 0.8) * seconds for _ in range(2)]:
        run(killed, wait)
        if is_finished(killed):
            break
    else:
        run(killed)
    require_same_run(killed, undisturbed)
