"""Names, plain data and refusals of schemes."""

import json
from typing import Any

import pytest

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.normal_grid import NormalQuantizer
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.surgery.scheme import FLOAT, Scheme, Sinks

CACHE2 = Quantizer(2, symmetric=False)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(), "w4a4kv4"),
        (FLOAT, "w16a16kv16"),
        (Scheme(weights=None, values=CACHE2), "w16a4k4v2"),
        (Scheme(activations=Quantizer(8), keys=None, values=None), "w4a8kv16"),
        (Scheme(keys=None), "w4a4k16v4"),
        (Scheme(weights=Quantizer(3), keys=CACHE2, values=CACHE2), "w3a4kv2"),
        (Scheme(higgs_bits=[3, 3]), "w3a4kv4"),
        (Scheme(higgs_bits=[3, 4, 3, 2, 3, 4]), "w3.17a4kv4"),
    ],
)
def test_name(scheme: Scheme, name: str) -> None:
    assert scheme.name == name


def test_defaults_are_the_papers() -> None:
    scheme = Scheme()
    assert scheme.weights == Quantizer(4, symmetric=True)
    assert scheme.activations == Quantizer(4, symmetric=True, clip="ratio:0.9")
    assert scheme.keys == scheme.values == Quantizer(4, symmetric=False, clip="ratio:0.95")


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        FLOAT,
        Scheme(weights=Quantizer(3, False, "ratio:0.9", 16), activations=None, values=CACHE2),
        Scheme(attention_output="head", sinks=Sinks(4, 8)),
        Scheme(centre=True, activation_scales="static"),
        Scheme(prefix=[1, 17]),
        Scheme(weights=Quantizer(3, group_size=16), higgs_bits=[2, 8]),
    ],
)
def test_round_trip_through_json(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_plain_data_names_every_setting() -> None:
    data = Scheme(values=None).to_dict()
    assert data["values"] is None
    assert data["activations"] == {"bits": 4, "symmetric": True, "clip": "ratio:0.9", "group_size": None}


def test_cards_of_before_there_were_other_scales_are_read() -> None:
    data = Scheme(values=None).to_dict()
    for key in ("attention_output", "higgs_bits", "sinks", "activation_scales", "prefix"):
        del data[key]
    assert Scheme.from_dict(data) == Scheme(values=None)


def test_what_the_output_projection_reads() -> None:
    assert Scheme().output_activations(16) == Scheme().activations
    assert Scheme(attention_output="head").output_activations(16) == Quantizer(4, True, "ratio:0.9", group_size=16)
    assert Scheme(activations=None, attention_output="head").output_activations(16) is None
    with pytest.raises(ValueError, match="attention_output is 'layer'; write token or head"):
        Scheme(attention_output="layer")  # type: ignore[arg-type]


def test_weights_refuse_a_quantile() -> None:
    with pytest.raises(ValueError, match=r"weights.clip is 'quantile:0.98'.*ratio:1.0"):
        Scheme(weights=Quantizer(4, clip="quantile:0.98"))


def test_every_layer_has_its_bits() -> None:
    scheme = Scheme(weights=Quantizer(4, group_size=16), higgs_bits=[2, 8])
    assert [scheme.layer_weights(i) for i in (0, 1)] == [NormalQuantizer(2, 16), NormalQuantizer(8, 16)]
    assert Scheme().layer_weights(1) == Quantizer(4)
    assert FLOAT.layer_weights(0) is None


@pytest.mark.parametrize(
    ("weights", "bits", "message"),
    [
        (Quantizer(4, symmetric=False), [4], "weights are .*symmetric=False.*; higgs"),
        (Quantizer(4, clip="ratio:0.9"), [4], "weights are .*ratio:0.9.*; higgs"),
        (Quantizer(4), [4, 1], "bits is 1"),
        (None, [4], "higgs_bits are given and weights is null"),
        (Quantizer(4), [], "higgs_bits is empty"),
    ],
)
def test_bits_of_layers_that_no_normal_grid_has(weights: Quantizer | None, bits: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(weights=weights, higgs_bits=bits)


@pytest.mark.parametrize("data", [{"weights": {"bits": 1}}, {"keys": {"clip": "ratio:2"}}])
def test_unusable_data_raises(data: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ValueError, match=r"bits is 1|clip is 'ratio:2'"):
        Scheme.from_dict(data)


def test_unknown_parts_raise() -> None:
    with pytest.raises(TypeError, match="biases"):
        Scheme.from_dict({"biases": None})


def test_centring_what_is_not_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match="centre is true and activations is null"):
        Scheme(activations=None, centre=True)
    with pytest.raises(ConfigError, match="centre_keys is true and keys is null"):
        Scheme(keys=None, centre_keys=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_scales": "tensor"}, "activation_scales is 'tensor'; write token or static"),
        ({"activations": None}, "activation_scales is static and activations is null"),
        ({"attention_output": "head"}, "activation_scales is static and attention_output is head"),
        ({"activations": Quantizer(4, group_size=16)}, "activation_scales is static and activations.group_size is 16"),
        ({"activations": Quantizer(4, clip="quantile:0.98")}, "static and activations.clip is 'quantile:0.98'.*ratio"),
    ],
)
def test_static_scales_of_what_has_several(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme(**{"activation_scales": "static", **change})


def test_what_a_text_decides() -> None:
    assert not Scheme().calibrated
    assert all(Scheme(**{part: True}).calibrated for part in ("centre", "centre_keys"))
    assert Scheme(activation_scales="static").calibrated
