"""The real commands on small models: recipes, and `kurtail` within this process or in one of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Its logger keeps the stderr of the moment it is imported: not that of a single test, which is closed afterwards.
import lightning  # noqa: F401
import pytest
import torch

from kurtail_pl.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
KURTAIL = ("-m", "kurtail_pl")


def smoke_recipe(model: Path, text: Path) -> str:
    """configs/smoke/smollm2-135m.yaml for another model and text, with GPTQ; its folders are `runs` and `artifacts`."""
    recipe = (ROOT / "configs" / "smoke" / "smollm2-135m.yaml").read_text()
    for old, new in (
        ("model: smollm2-135m", f"model: {model}"),
        ("source: pydoc", f"source: {text}"),
        ("runs/smoke", "runs"),
        ("artifacts/smoke", "artifacts"),
        ("method: rtn", "method: gptq"),
    ):
        assert old in recipe
        recipe = recipe.replace(old, new)
    return recipe


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
