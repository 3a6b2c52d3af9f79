"""Schemes in which artefacts differ by what they store and how they compute."""

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import LowRank, Normal, PerTokenHead, Sinks, Uniform
from kurtail_pl.methods.scheme import FLOAT, Scheme

EIGHT = Quantizer(8)
SCHEMES = {
    "16-16-16": FLOAT,
    "4-16-16": Scheme(activations=None, cache=None),
    "4-8-8": Scheme(activations=EIGHT, cache=PerTokenHead(EIGHT, EIGHT)),
    "4-4-16": Scheme(cache=None),
    "3-4-4": Scheme(weights=Uniform(3)),
    "per head": Scheme(activations=Quantizer(4, False), attention_output="head"),
    "w3 groups, a8, k4v2": Scheme(
        Uniform(3, False, group_size=4),
        Quantizer(8, clip=Clip("quantile", 0.98)),
        PerTokenHead(values=Quantizer(2, False)),
    ),
    "w8": Scheme(Uniform(8), None, None),
    "kv4": Scheme(weights=None, activations=None),
    "sinks": Scheme(weights=None, cache=PerTokenHead(sinks=Sinks(2, 8))),
    "prefix": Scheme(None, cache=PerTokenHead(centre_keys=True), prefix=[5, 7]),
    "static": Scheme(activation_scales="static"),
    "static, centred": Scheme(
        None, Quantizer(4, False), PerTokenHead(centre_keys=True), centre=True, activation_scales="static"
    ),
    "bits by layer": Scheme(Uniform(4, False, group_size=4), None, None, layer_bits=[2, 8, 3, 5]),
    "side": Scheme(centre=True, side=LowRank(3, rounds=2)),
    "higgs": Scheme(Normal(), activation_scales="static"),
    "higgs, bits by layer": Scheme(Normal(group_size=4), None, None, layer_bits=[2, 8, 3, 5]),
}
