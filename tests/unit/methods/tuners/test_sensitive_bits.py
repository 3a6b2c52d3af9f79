"""Bits chosen for layers against all assignments; averages that cannot be had."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.normal_grid import normal_error
from kurtail_pl.methods import RTN, Normal, SensitiveBits, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuners.sensitive_bits import WIDTHS
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec

pytestmark = pytest.mark.usefixtures("cache")
WEIGHTS_ONLY = Scheme(Normal(), activations=None, cache=None)


def test_bits_are_the_best_of_all_assignments() -> None:
    sensitivities = [0.5, 9.0, 2.0, 0.01]
    found = SensitiveBits(3.5).bits(Normal(), sensitivities)

    def growth(bits: tuple[int, ...] | list[int]) -> float:
        return sum(a * normal_error(b) for a, b in zip(sensitivities, bits, strict=True))

    assert growth(found) == pytest.approx(min(growth(a) for a in product(WIDTHS, repeat=4) if sum(a) <= 14))
    assert found[1] > found[0] > found[3]


def test_an_artefact_has_the_bits_that_were_chosen(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    spec = QuantizeSpec(WEIGHTS_ONLY, RTN(), bits=SensitiveBits(3.25), text=text)
    assert spec.scheme_name == "w3.25a16kv16"
    folder = quantize(fused, spec, tmp_path / "out")
    card = json.loads((folder / "kurtail.json").read_text())
    bits = card["scheme"]["layer_bits"]
    assert sum(bits) <= 13
    assert set(bits) <= set(WIDTHS)
    assert bits == SensitiveBits(3.25).bits(Normal(), card["sensitivities"])
    assert card["calibration_text_sha256"] is not None
    # The same as when the bits are given, and no sensitivities measured.
    given = quantize(fused, QuantizeSpec(replace(WEIGHTS_ONLY, layer_bits=bits), RTN()), tmp_path / "given")
    for path in folder.glob("model*.safetensors"):
        made, expected = load_file(path), load_file(given / path.name)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"scheme": Scheme(Uniform())}, r"bits.average is 3\.5.*where the error of a format is known: .* normal"),
        ({"scheme": Scheme(weights=None)}, "give scheme.weights with levels of the normal distribution"),
        ({"scheme": Scheme(Normal(), layer_bits=[4] * 4)}, "layer_bits null"),
    ],
)
def test_averages_that_cannot_be_had(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeSpec(**{"scheme": Scheme(Normal()), "bits": SensitiveBits(3.5), **spec})  # type: ignore[arg-type]


@pytest.mark.parametrize("average", [1.5, 9.0])
def test_averages_out_of_range(average: float) -> None:
    with pytest.raises(ConfigError, match=rf"bits.average is {average}; layers have 2 to 8"):
        SensitiveBits(average)
