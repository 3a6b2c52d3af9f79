"""Modules without weights."""

from pathlib import Path

import pytest
from schemes import SCHEMES

from kurtail_pl.artefact.skeleton import skeleton, stored_bytes
from kurtail_pl.methods import RTN
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.joining import pieces_of


def test_a_plain_folder_has_the_modules_of_its_weights(tiny: Path) -> None:
    model = skeleton(Checkpoint(tiny))
    assert set(model.state_dict()) == set(Checkpoint(tiny).names)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["w8", "kv4", "3-4-4", "w3 groups, a8, k4v2", "bits by layer", "higgs"])
def test_bytes_are_known_before_they_are_written(name: str, fused: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = quantize(fused, QuantizeSpec(SCHEMES[name], RTN(), text=text), tmp_path / "made")
    written = sum(piece.size for piece in pieces_of(folder / "model.safetensors"))
    assert stored_bytes(skeleton(Checkpoint(fused)), SCHEMES[name]) == pytest.approx(written, rel=0.02)
