"""Clip ratios of single sites in the graph: torch's logits, for dense layers and experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import CENTRED, has_torchs_logits
from kurtail_onnx.exporter import ONNX

import kurtail_pl
from kurtail_pl.methods import RTN, LearnedClips, SearchedClips
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

LEARNED = {"clips": LearnedClips(["activations", "keys", "values", "weights"], 3, 0.02, windows=2, seqlen=64)}
SEARCHED = {"clips": SearchedClips()}


@pytest.mark.parametrize(
    ("family", "centred", "clips"),
    [("llama3", True, SEARCHED), ("mixtral", False, SEARCHED), ("llama3", True, LEARNED)],
    ids=["searched", "searched, experts", "learned"],
)
def test_every_site_has_its_ratio(
    family: str,
    centred: bool,
    clips: dict[str, Any],
    make_family: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint(make_family(family))
    fused = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    spec = QuantizeSpec(
        Scheme(**CENTRED) if centred else Scheme(),
        RTN(),
        text=TextSpec(str(text_file), windows=2, seqlen=64),
        quantized_activations=True,
        **clips,
    )
    artefact = quantize(fused, spec, tmp_path / "artefact")
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    model = kurtail_pl.load(artefact)
    assert has_torchs_logits(model, folder)
    ratios = json.loads((artefact / "kurtail.json").read_text())["clips"]
    assert json.loads((folder / "kurtail_export.json").read_text())["clips"] == ratios
    assert len({ratio for layer in ratios for ratio in layer.values()}) > 1
