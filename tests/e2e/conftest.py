"""The real commands on small models: recipes, and `kurtail` within this process or in one of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

# Its logger keeps the stderr of the moment it is imported: not that of a single test, which is closed afterwards.
import lightning as L
import pytest
import torch
import yaml

from kurtail_pl.cli.main import main
from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.methods.method import Method
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.text import TextSpec

ROOT = Path(__file__).resolve().parents[2]
KURTAIL = ("-m", "kurtail_pl")


def smoke_recipe(model: Path, text: Path) -> str:
    """configs/base.yaml under smoke.yaml, for another model and text, with GPTQ; its folders: `runs`, `artifacts`."""
    base, smoke = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("base", "smoke"))
    settings = merged(base, smoke)
    settings["data"]["init_args"]["capture"]["model"] = str(model)
    settings["data"]["init_args"]["store"] = "runs/store"
    settings["trainer"]["default_root_dir"] = "runs"
    settings["figures"]["layers"] = []  # Which take as long to draw as all else does together.
    settings["quantization"]["out"] = f"artifacts/{model.name}-kurtail-w4a4kv4"
    settings["quantization"]["rounder"]["class_path"] = "kurtail_pl.methods.GPTQ"
    for place in (settings["data"]["init_args"]["capture"], settings["quantization"], settings["evaluation"]):
        place["text"]["source"] = str(text)
    return yaml.safe_dump(settings, sort_keys=False)


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings with others over them, key by key."""
    both = [key for key in over if isinstance(over[key], dict) and isinstance(under.get(key), dict)]
    return under | over | {key: merged(under[key], over[key]) for key in both}


def by_kind(method: dict[str, Any]) -> dict[str, Any]:
    """A method of a recipe as cards have it; a class that came later has no use for all that another had."""
    name = method["class_path"].rpartition(".")[2]
    kinds = Method.kinds()
    known = {field.name for field in fields(kinds[name])}
    return {"kind": name, "settings": {key: value for key, value in method["init_args"].items() if key in known}}


def run_kurtail(folder: Path, *arguments: object) -> None:
    deterministic, log = torch.are_deterministic_algorithms_enabled(), logging.getLogger("kurtail_pl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["kurtail"])
        for name in ("handlers", "level", "propagate"):  # the command sets up its own log
            patch.setattr(log, name, [] if name == "handlers" else getattr(log, name))
        try:
            main([str(argument) for argument in arguments])
        finally:
            torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def kurtail() -> Callable[..., None]:
    """Run a verb in this process, in a folder; leaves no global state."""
    return run_kurtail


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python program, by default the `kurtail` command, in a folder of its own process.

    With `process_group` 0 it leads a group of processes: those that it starts can be killed together with it.
    """

    def start(
        folder: Path, *arguments: object, program: tuple[str, ...] = KURTAIL, process_group: int | None = None
    ) -> subprocess.Popen[str]:
        command = [sys.executable, *program, *map(str, arguments)]
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=process_group,
        )

    return start


@pytest.fixture
def recipe(tied: Path, text_file: Path, tmp_path: Path) -> Path:
    """Recipe of the tiny Llama with tied embeddings, in a folder where it can be run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(smoke_recipe(tied, text_file))
    return path


@pytest.fixture(scope="session")
def write_recipe() -> Callable[[Path, Path], str]:
    """Text of a recipe for a model and a text."""
    return smoke_recipe


@pytest.fixture
def own_trainer(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Learn as the recipe says in a program of one's own: a bare trainer with these callbacks, folder `runs`."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.chdir(recipe.parent)

    def fit(*callbacks: L.Callback) -> None:
        settings = yaml.safe_load(recipe.read_text())["data"]["init_args"]
        text, rows = settings["capture"]["text"], settings["capture"]["rows"]
        data = ActivationDataModule(
            CaptureSpec(settings["capture"]["model"], TextSpec(**text), rows),
            **{name: settings[name] for name in ("store", "steps", "batch_rows", "validation_rows")},
        )
        module = KurTailModule(data.sizes)
        trainer = L.Trainer(
            default_root_dir="runs", max_epochs=1, accelerator="cpu", deterministic=True, callbacks=list(callbacks),
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)

    yield fit
    torch.use_deterministic_algorithms(deterministic)
