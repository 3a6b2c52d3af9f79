"""A folder with everything that commands read, and the commands."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.faults.forks import Ended, Server, contents

TEXT = ("--text.source", "tales.txt", "--text.windows", "8", "--text.seqlen", "64")
SPEC_TEXT = tuple(part.replace("--text", "--spec.text") for part in TEXT)
CAPTURE = ("capture", "--spec.model", "model", *SPEC_TEXT, "--spec.rows", "256", "--out")
FUSE = ("fuse", "--model", "model", "--method", "quarot", "--out")
QUANTIZE = ("quantize", "--artefact", "fused", "--spec.rounder", "GPTQ", *SPEC_TEXT, "--out")
EVAL = ("eval", "--model", "artefact", *TEXT, "--store", "store", "--validation_rows", "64")
REPORT = ("report", "--artefact", "artefact")
EXPORT = ("export", "--artefact", "artefact", "--out")
FIGURES = ("figures", "--store", "store", "--rotations", "fused/rotations.safetensors", "--validation_rows", "64")

MADE_BY = {
    "store": (["model"], [(*CAPTURE, "store")]),
    "fused": (["model"], [(*FUSE, "fused")]),
    "artefact": (["fused", "store"], [(*QUANTIZE, "artefact"), EVAL, REPORT]),
    "onnx": (["artefact"], [(*EXPORT, "onnx")]),
}
"""What commands read and others make: of what, and how."""


@dataclass(frozen=True)
class Scene:
    """A command that reads these parts of the stage, and needs this module of an extra."""

    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    extra: str = "torch"

    @property
    def verb(self) -> str:
        return self.arguments[0]


SCENES = {
    "capture": Scene((*CAPTURE, "out"), ("model",)),
    "fuse": Scene((*FUSE, "out"), ("model",)),
    "fuse over another": Scene((*FUSE, "fused", "--seed", "1", "--overwrite"), ("model", "fused")),
    "quantize": Scene((*QUANTIZE, "out"), ("fused",)),
    "quantize over another": Scene((*QUANTIZE, "artefact", "--spec.seed", "1", "--overwrite"), ("fused", "artefact")),
    "eval": Scene(("eval", "--model", "model", *TEXT), ("model",)),
    "eval of a GGUF file": Scene(("eval", "--model", "little.gguf", *TEXT), ("little.gguf",)),
    "eval with a store": Scene(EVAL, ("artefact", "store")),
    "tasks": Scene(
        ("eval", "--model", "artefact", "--tasks.folder", "tasks", "--tasks.limit", "3"),
        ("artefact", "tasks"),
        "lm_eval",
    ),
    "figures": Scene((*FIGURES, "--out", "out", "--layers", "[1]"), ("model", "store", "fused")),
    "report": Scene(REPORT, ("artefact",)),
    "export": Scene((*EXPORT, "out"), ("artefact",), "onnxruntime"),
    "export over another": Scene(
        (*EXPORT, "onnx", "--to.dtype", "fp16", "--overwrite"), ("artefact", "onnx"), "onnxruntime"
    ),
    "fit": Scene(("fit", "--config", "recipe.yaml"), ("model", "recipe.yaml")),
    "compare": Scene(("compare", "--config", "recipe.yaml", "--weights", "rtn"), ("model", "recipe.yaml")),
}


class Stage:
    """Where scenes are played: `all` holds what they read, as far as it was asked for; each try has its own folder."""

    def __init__(self, place: Path, server: Server) -> None:
        self._place, self._server = place, server
        self._undisturbed: dict[str, Undisturbed] = {}
        self.all = place / "all"

    def set_up(self, scene: Scene, name: str = "try") -> Path:
        """A new folder with what a scene reads; skips when its extra is not installed."""
        pytest.importorskip(scene.extra)
        for part in scene.reads:
            self._make(part)
        root = self._place / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for part in ("tales.txt", *scene.reads):
            copy = shutil.copytree if (self.all / part).is_dir() else shutil.copy
            copy(self.all / part, root / part)
        return root

    def _make(self, part: str) -> None:
        if (self.all / part).exists():
            return
        source, commands = MADE_BY[part]
        for other in source:
            self._make(other)
        for arguments in commands:
            end = self.run(self.all, arguments)
            assert end.code == 0, end.error

    def move(self, root: Path, name: str) -> Path:
        """Give a folder another path."""
        moved = self._place / name
        shutil.rmtree(moved, ignore_errors=True)
        return root.rename(moved)

    def run(self, root: Path, arguments: Sequence[str], **options: Any) -> Ended:
        """Run a command in a folder, its cache in it."""
        [end] = self.run_together(root, arguments, [0], **options)
        return end

    def run_together(self, root: Path, arguments: Sequence[str], after: Sequence[int], **options: Any) -> list[Ended]:
        """Run a command several times at once, each when the first has made so many calls."""
        common = {"folder": root, "below": root, "environment": {"KURTAIL_CACHE": str(root / "cache")}, **options}
        return self._server.run(*({**common, "arguments": list(arguments), "after": calls} for calls in after))

    def undisturbed(self, name: str) -> "Undisturbed":
        """The scene alone."""
        if name not in self._undisturbed:
            root, trace = self.set_up(SCENES[name], "undisturbed"), self._place / "trace"
            end = self.run(root, SCENES[name].arguments, trace=trace)
            assert end.code == 0, end.error
            calls = [line.replace(str(root), "") for line in trace.read_text().splitlines()]
            self._undisturbed[name] = Undisturbed(contents(root), end.out, end.error, calls)
        return self._undisturbed[name]


@dataclass(frozen=True)
class Undisturbed:
    """What a folder holds after a scene, what was printed and said, and its calls: kind, name and path."""

    contents: dict[str, Any]
    out: str
    error: str
    calls: list[str]
