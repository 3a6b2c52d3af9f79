"""Artefacts of the tiny model, of every family and of stories260k."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exports import CENTRED
from families import tiny_family
from kurtail_onnx.exporter import ONNX

from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations

MakeArtefact = Callable[..., Path]


@pytest.fixture(scope="session")
def make_artefact(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> MakeArtefact:
    """Rotate a model folder by random Hadamards and round its weights; each is made once."""
    made: dict[tuple[Path, str, bool], Path] = {}
    fused: dict[tuple[Path, bool], Path] = {}
    text = TextSpec(str(text_file), windows=4, seqlen=64)

    def make(model: Path, rotated: bool = True, **quantizers: Any) -> Path:
        scheme = replace(Scheme(), **quantizers)
        key = (model, str(scheme), rotated)
        if key not in made:
            place = tmp_path_factory.mktemp("artefact")
            if (model, rotated) not in fused:
                checkpoint = Checkpoint(model)
                rotations = random_rotations(checkpoint.config, 0) if rotated else Rotations()
                fused[model, rotated] = fuse(checkpoint, rotations, "quarot", place / "fused")
            made[key] = quantize(fused[model, rotated], QuantizeSpec(scheme, RTN(), text=text), place / "artefact")
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_family(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a family's tiny model, with a tokenizer; keyword arguments change its configuration."""

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("families") / name
        tiny_family(name, **changes).save_pretrained(folder)
        copy_tokenizer(tied, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def artefact(tiny: Path, make_artefact: MakeArtefact) -> Path:
    """The tiny Llama in 4 bits everywhere."""
    return make_artefact(tiny)


@pytest.fixture(scope="session")
def exported(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, unchecked; tests copy it before they change it."""
    return export(artefact, tmp_path_factory.mktemp("exports") / "tiny", ONNX(), check=False)


@pytest.fixture(scope="session")
def story_artefact(stories: Path, make_artefact: MakeArtefact) -> Path:
    return make_artefact(stories)


@pytest.fixture(scope="session")
def centred_stories(stories: Path, make_artefact: MakeArtefact) -> Path:
    """stories260k with centred inputs."""
    return make_artefact(stories, **CENTRED)


@pytest.fixture(scope="session")
def static_stories(stories: Path, make_artefact: MakeArtefact) -> Path:
    """stories260k with static grids of centred inputs, and a prefix."""
    return make_artefact(stories, **CENTRED, activation_scales="static", prefix=[1])


@pytest.fixture(scope="session")
def grouped(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are 64, 96 and 160, so that groups of 16 and 32 divide them."""
    folder = tmp_path_factory.mktemp("grouped") / "model"
    tiny_family("qwen3", hidden_size=64, intermediate_size=160).save_pretrained(folder)
    copy_tokenizer(tied, folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for file in source.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
