"""A new exporter is one file and an entry point: it is found by its name, and gets what is common to all exports."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from safetensors import safe_open

from kurtail_pl.cli.export import GROUP, exporters

Kurtail = Callable[..., None]

TOY = '''
import json
from dataclasses import dataclass
from typing import Literal

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.errors import CheckFailed


@dataclass(frozen=True)
class Toy(Exporter):
    """Names and shapes of the tensors.

    Args:
        order: of each shape.
        lost: leave out the first tensor, as an exporter with a bug does.
    """

    order: Literal["torch", "reversed"] = "torch"
    lost: bool = False

    def sentence(self):
        return f"shapes in the order of {self.order}"

    def refuses(self, source):
        if source.scheme.weights is None:
            return "the weights are float; quantize them"
        return None

    def shapes(self, source):
        step = 1 if self.order == "torch" else -1
        return {name: list(source.checkpoint.tensor(name).shape)[::step] for name in source.checkpoint.names}

    def write(self, source, folder):
        shapes = list(self.shapes(source).items())
        (folder / "shapes.json").write_text(json.dumps(dict(shapes[self.lost :])))
        return {"tensors": len(shapes)}

    def check(self, source, folder):
        if json.loads((folder / "shapes.json").read_text()) != self.shapes(source):
            raise CheckFailed("a tensor is not there")
        return {"compared": "shapes"}
'''


@pytest.fixture
def place(
    tied: Path, kurtail: Kurtail, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with artefacts ``story`` and ``fused``, where a package is installed that declares exporters."""
    place = tmp_path_factory.mktemp("toy")
    kurtail(place, "fuse", "--model", tied, "--method", "quarot", "--out", "fused")
    kurtail(place, "quantize", "--artefact", "fused", "--spec.rounder", "RTN", "--out", "story")
    packages = tmp_path_factory.mktemp("packages")
    (packages / "toy_exporter.py").write_text(TOY)
    (packages / "broken_exporter.py").write_text("import a_runtime_that_nobody_has\n")
    (packages / "toys-1.0.dist-info").mkdir()
    (packages / "toys-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    declared = f"[{GROUP}]\ntoy = toy_exporter:Toy\nbroken = broken_exporter:Broken\n"
    (packages / "toys-1.0.dist-info" / "entry_points.txt").write_text(declared)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "toy_exporter", raising=False)
    return place


def test_an_exporter_is_one_file(place: Path, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]) -> None:
    kurtail(place, "export", "--artefact", "story", "--out", "toy", "--to", "toy", "--to.order", "reversed")
    written = json.loads((place / "toy" / "shapes.json").read_text())
    expected = {}
    for file in (place / "story").glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            expected |= {name: tensors.get_slice(name).get_shape()[::-1] for name in tensors.keys()}  # noqa: SIM118
    assert written == expected
    description = json.loads((place / "toy" / "kurtail_export.json").read_text())
    assert description["export"] == {"kind": "Toy", "settings": {"order": "reversed", "lost": False}}
    assert description["source"]["artefact"] == "story"
    assert description["tensors"] == len(expected)
    assert set(description["sha256"]) == {"shapes.json"}
    assert json.loads((place / "toy" / "checks.json").read_text()) == {"compared": "shapes"}
    assert "quantized by quarot, as shapes in the order of reversed." in (place / "toy" / "README.md").read_text()
    assert "exported story to toy in" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        kurtail(place, "export", "--to", "toy", "--help")
    help_ = capsys.readouterr().out
    assert "--to NAME: broken, gguf, onnx (by default), toy, vllm" in " ".join(help_.split())
    assert "--to.order" in help_
    assert "--to.dtype" not in help_


def test_settings_may_stand_in_a_file(place: Path, kurtail: Kurtail) -> None:
    (place / "toy.yaml").write_text("artefact: story\nout: toy\ncheck: false\nto:\n  order: reversed\n")
    kurtail(place, "export", "--to", "toy", "--config", "toy.yaml")
    description = json.loads((place / "toy" / "kurtail_export.json").read_text())
    assert description["export"]["settings"]["order"] == "reversed"
    assert not (place / "toy" / "checks.json").exists()
    assert "not checked" in (place / "toy" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--artefact", "fused", "--to", "toy"), "the weights are float; quantize them", "1"),
        (("--artefact", "story", "--to", "toy", "--to.lost", "true"), "a tensor is not there", "1"),
        (("--artefact", "story", "--to", "toy", "--to.order", "onward"), "order is onward, expected one of", "2"),
        (("--artefact", "story", "--to", "toy", "--to.dtype", "fp16"), "no setting to.dtype", "2"),
        (("--artefact", ".", "--to", "toy"), "kurtail.json", "1"),
        (("--artefact", "story", "--to", "toi"), "one of broken, gguf, onnx, toy, vllm; did you mean toy?", "2"),
        (("--artefact", "story", "--to", "broken"), "a_runtime_that_nobody_has; run: pip install 'toys[broken]'", "1"),
        (("--artefact", "story", "--to"), "--to: expected one argument", "2"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_leave_nothing(
    place: Path,
    kurtail: Kurtail,
    options: tuple[str, ...],
    message: str,
    code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match=code):
        kurtail(place, "export", "--out", "toy", *options)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(place.rglob("*")) == before


def test_an_existing_folder_stays_until_it_is_overwritten(place: Path, kurtail: Kurtail) -> None:
    arguments = ("export", "--artefact", "story", "--out", "toy", "--to", "toy")
    kurtail(place, *arguments)
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, *arguments, "--to.order", "reversed")
    kept = json.loads((place / "toy" / "kurtail_export.json").read_text())
    assert kept["export"]["settings"]["order"] == "torch"
    kurtail(place, *arguments, "--to.order", "reversed", "--overwrite")
    assert sorted(path.name for path in place.iterdir()) == ["fused", "story", "toy"]


def test_a_checkout_knows_its_exporters_without_being_installed_again() -> None:
    """By its pyproject.toml; what is installed may be older and then has none of them."""
    installed = {point.name for point in entry_points(group=GROUP)}
    assert set(exporters()) >= installed | {"gguf", "onnx"}
