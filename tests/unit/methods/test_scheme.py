"""Names, plain data and refusals of schemes."""

import json
from typing import Any

import pytest

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import NVFP4, Format, LowRank, Normal, PerTokenHead, Sinks, Uniform
from kurtail_pl.methods.scheme import FLOAT, Scheme

CACHE2 = Quantizer(2, symmetric=False)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(), "w4a4kv4"),
        (FLOAT, "w16a16kv16"),
        (Scheme(weights=None, cache=PerTokenHead(values=CACHE2)), "w16a4k4v2"),
        (Scheme(activations=Quantizer(8), cache=None), "w4a8kv16"),
        (Scheme(cache=PerTokenHead(None)), "w4a4k16v4"),
        (Scheme(weights=Uniform(3), cache=PerTokenHead(CACHE2, CACHE2)), "w3a4kv2"),
        (Scheme(layer_bits=[3, 3]), "w3a4kv4"),
        (Scheme(layer_bits=[3, 4, 3, 2, 3, 4]), "w3.17a4kv4"),
    ],
)
def test_name(scheme: Scheme, name: str) -> None:
    assert scheme.name == name


def test_defaults_are_the_papers() -> None:
    scheme = Scheme()
    assert scheme.weights == Uniform(4, symmetric=True)
    assert scheme.activations == Quantizer(4, symmetric=True, clip=Clip(amount=0.9))
    quantizer = Quantizer(4, symmetric=False, clip=Clip(amount=0.95))
    assert scheme.cache == PerTokenHead(quantizer, quantizer)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        FLOAT,
        Scheme(weights=Uniform(3, False, 16), activations=None, cache=PerTokenHead(values=CACHE2)),
        Scheme(attention_output="head", cache=PerTokenHead(sinks=Sinks(4, 8))),
        Scheme(centre=True, activation_scales="static"),
        Scheme(prefix=[1, 17]),
        Scheme(weights=Uniform(3, group_size=16), layer_bits=[2, 8]),
        Scheme(weights=Normal(3, 16), layer_bits=[2, 8]),
        Scheme(weights=NVFP4()),
        Scheme(side=LowRank(8, rounds=3, weighted=False)),
        Scheme(weights=Uniform(4, False, 32, "float16")),
    ],
)
def test_round_trip_through_json(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_plain_data_names_every_setting() -> None:
    data = Scheme(cache=PerTokenHead(values=None)).to_dict()
    assert data["cache"]["kind"] == "PerTokenHead"
    assert data["cache"]["settings"]["values"] is None
    assert Scheme(cache=None).to_dict()["cache"] is None
    settings = {"bits": 4, "symmetric": True, "group_size": None, "scales": "float32"}
    assert data["weights"] == {"kind": "Uniform", "settings": settings}
    assert data["activations"] == {
        "bits": 4,
        "symmetric": True,
        "clip": {"kind": "ratio", "amount": 0.9},
        "group_size": None,
        "levels": "integer",
        "scales": "float32",
    }


def test_cards_of_before_there_were_other_scales_are_read() -> None:
    data = Scheme(cache=None).to_dict()
    for key in ("attention_output", "layer_bits", "activation_scales", "prefix", "side"):
        del data[key]
    assert Scheme.from_dict(data) == Scheme(cache=None)


def test_what_the_output_projection_reads() -> None:
    assert Scheme().output_activations(16) == Scheme().activations
    assert Scheme(attention_output="head").output_activations(16) == Quantizer(4, True, Clip(amount=0.9), group_size=16)
    assert Scheme(activations=None, attention_output="head").output_activations(16) is None
    with pytest.raises(ValueError, match="attention_output is 'layer'; write token or head"):
        Scheme(attention_output="layer")  # type: ignore[arg-type]


def test_every_layer_has_its_bits() -> None:
    scheme = Scheme(weights=Normal(4, group_size=16), layer_bits=[2, 8])
    assert [scheme.layer_weights(i) for i in (0, 1)] == [Normal(2, 16), Normal(8, 16)]
    scheme = Scheme(weights=Uniform(4, False, 16), layer_bits=[2, 8])
    assert [scheme.layer_weights(i) for i in (0, 1)] == [Uniform(b, False, 16) for b in (2, 8)]
    assert Scheme().layer_weights(1) == Uniform(4)
    assert FLOAT.layer_weights(0) is None


@pytest.mark.parametrize(
    ("weights", "bits", "message"),
    [
        (Uniform(4), [4, 1], "bits is 1; a quantizer has 2 to 8"),
        (Normal(4), [4, 9], "bits is 9; a grid of the normal distribution has 2 to 8"),
        (NVFP4(), [4, 4], "layers have bits of their own, and NVFP4 has no setting bits; leave them out"),
        (None, [4], "layer_bits are given and weights is null"),
        (Uniform(4), [], "layer_bits is empty"),
    ],
)
def test_bits_of_layers_that_the_format_does_not_take(weights: Format | None, bits: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme(weights=weights, layer_bits=bits)


def weights_of(**settings: Any) -> dict[str, Any]:
    return {"weights": {"kind": "Uniform", "settings": settings}}


def cache_of(**settings: Any) -> dict[str, Any]:
    return {"cache": {"kind": "PerTokenHead", "settings": settings}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (weights_of(bits=1), "Scheme.weights .* bits is 1;"),
        (weights_of(bits="4"), r"Uniform.bits is '4': Input should be a valid integer"),
        (weights_of(bits=4.5), r"Uniform.bits is 4.5"),
        (weights_of(symmetric=1), r"Uniform.symmetric is 1: Input should be a valid boolean"),
        (weights_of(colour=1), r"Uniform.colour is 1: Unexpected"),
        ({"weights": {"bits": 4}}, "None is no format of this version"),
        ({"weights": {"kind": "Kind", "settings": {}}}, "'Kind' is no format of this version; use the one that made"),
        ({"weights": {"kind": "GPTQ", "settings": {}}}, "'GPTQ' is no format"),
        (cache_of(keys={"clip": {"amount": 2}}), "clip.amount is 2"),
        (cache_of(keys={"clip": {"kind": "share"}}), "clip.kind is 'share'"),
        (cache_of(keys={"clip": "ratio:0.9"}), "PerTokenHead.keys.clip is 'ratio:0.9'"),
        (cache_of(keys={"bits": "4"}), "PerTokenHead.keys.bits is '4': Input should be a valid integer"),
        (cache_of(sinks={"tokens": "1"}), "PerTokenHead.sinks.tokens is '1'"),
        ({"cache": {"kind": "Uniform", "settings": {}}}, "'Uniform' is no cache format of this version"),
        ({"side": {"kind": "LowRank", "settings": {"rank": 0}}}, "side.rank is 0; give a positive number"),
        ({"side": {"kind": "LowRank", "settings": {"rounds": 0}}}, "side.rounds is 0; give a positive number"),
        ({"side": {"kind": "Uniform", "settings": {}}}, "'Uniform' is no side of this version"),
        ({"keys": None}, "Scheme.keys is None: Unexpected"),
        ({"prefix": ["a"]}, "Scheme.prefix.0 is 'a'"),
        ({"centre": "yes"}, "Scheme.centre is 'yes'"),
        ({"layer_bits": [4.5]}, "Scheme.layer_bits.0 is 4.5"),
        ({"biases": None}, "Scheme.biases is None: Unexpected"),
    ],
)
def test_unusable_data_raises(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme.from_dict(data)


def test_a_side_of_weights_that_stay_float_is_refused() -> None:
    with pytest.raises(ConfigError, match="side is given and weights is null"):
        Scheme(weights=None, side=LowRank())


def test_centring_what_is_not_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match="centre is true and activations is null"):
        Scheme(activations=None, centre=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_scales": "tensor"}, "activation_scales is 'tensor'; write token or static"),
        ({"activations": None}, "activation_scales is static and activations is null"),
        ({"attention_output": "head"}, "activation_scales is static and attention_output is head"),
        ({"activations": Quantizer(4, group_size=16)}, "activation_scales is static and activations.group_size is 16"),
        (
            {"activations": Quantizer(4, clip=Clip("quantile", 0.98))},
            "static and activations.clip is a quantile.*ratio",
        ),
    ],
)
def test_static_scales_of_what_has_several(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme(**{"activation_scales": "static", **change})


def test_what_a_text_decides() -> None:
    assert not Scheme().calibrated
    assert Scheme(centre=True).calibrated
    assert Scheme(cache=PerTokenHead(centre_keys=True)).calibrated
    assert not Scheme(cache=None).calibrated
    assert Scheme(activation_scales="static").calibrated
