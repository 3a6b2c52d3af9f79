"""Targets refuse what their runtimes do not compute; what they allow is what the runtimes' own code gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf import quantize as gguf_quantize

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods import (
    MXFP4,
    NVFP4,
    NVINT4,
    FloatZero,
    Int4PerTokenHead,
    LowRank,
    Mixed,
    MXFP4Plus,
    Normal,
    NUQCache,
    PerTokenHead,
    Progressive,
    Q4_0Cache,
    SearchedClips,
    Sinks,
    Skim,
    Sparse,
    Uniform,
)
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.methods.target import ONLINE
from kurtail_pl.methods.targets import TARGETS, TargetName

INT8 = Quantizer(8, group_size=32)
FP4 = Quantizer(group_size=32, levels="e2m1", scales="e8m0")
FITS: dict[TargetName, Scheme] = {
    "torch": Scheme(),
    "onnxruntime": Scheme(),
    "llama.cpp": Scheme(Uniform(scales="float16"), INT8, Q4_0Cache()),
    "vllm": Scheme(Uniform(), Quantizer(4), Int4PerTokenHead()),
}


@pytest.mark.parametrize("name", FITS)
def test_its_own_scheme_and_a_float_model_are_welcome(name: TargetName) -> None:
    for scheme in (FITS[name], FLOAT):
        TARGETS[name].require(scheme, None)


@pytest.mark.parametrize(
    ("name", "change", "setting"),
    [
        ("onnxruntime", {"weights": Normal()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform}"),
        ("onnxruntime", {"weights": FloatZero(symmetric=False)}, "kurtail_pl.methods.Uniform"),
        *(
            (name, {"weights": Progressive(32)}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform")
            for name in ("llama.cpp", "vllm")
        ),
        *(
            (name, {"weights": weights}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform")
            for name in ("onnxruntime", "llama.cpp", "vllm")
            for weights in (Mixed(), Skim())
        ),
        *((name, {"side": Sparse()}, "scheme.side: null") for name in ("onnxruntime", "llama.cpp", "vllm")),
        ("onnxruntime", {"weights": Uniform(3)}, "scheme.weights.bits: 4"),
        ("onnxruntime", {"activations": Quantizer(6)}, "scheme.activations.bits: 4"),
        ("onnxruntime", {"cache": PerTokenHead(sinks=Sinks())}, "scheme.cache.sinks: null"),
        ("onnxruntime", {"cache": PerTokenHead(keys=Quantizer(group_size=8))}, "scheme.cache.keys.group_size: null"),
        ("onnxruntime", {"cache": PerTokenHead(values=Quantizer(2))}, "scheme.cache.values.bits: 4"),
        ("onnxruntime", {"cache": Q4_0Cache()}, "scheme.cache.class_path: kurtail_pl.methods.PerTokenHead"),
        ("onnxruntime", {"cache": NUQCache()}, "scheme.cache.class_path: kurtail_pl.methods.PerTokenHead"),
        ("onnxruntime", {"activations": FP4}, "scheme.activations.levels: integer"),
        ("onnxruntime", {"cache": PerTokenHead(keys=Quantizer(scales="e4m3"))}, "scheme.cache.keys.levels: integer"),
        ("llama.cpp", {"activations": FP4}, "scheme.activations: {bits: 8"),
        ("vllm", {"activations": FP4}, "scheme.activations.levels: integer"),
        ("llama.cpp", {"weights": Normal()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform"),
        ("llama.cpp", {"weights": FloatZero(symmetric=False)}, "scheme.weights: {class_path"),
        ("llama.cpp", {"weights": Uniform()}, "scheme.weights.scales: float16"),
        ("llama.cpp", {"weights": Uniform(group_size=48, scales="float16")}, "scheme.weights.group_size: 32"),
        ("llama.cpp", {"activations": Quantizer(4)}, "scheme.activations: {bits: 8"),
        ("llama.cpp", {"activations": replace(INT8, clip=Clip(amount=0.9))}, "amount: 1.0"),
        ("llama.cpp", {"attention_output": "head"}, "scheme.attention_output: token"),
        ("llama.cpp", {"cache": PerTokenHead()}, "scheme.cache: null (float16)"),
        ("llama.cpp", {"centre": True}, "scheme.centre: false"),
        ("llama.cpp", {"prefix": [1]}, "scheme.prefix: null"),
        ("llama.cpp", {"side": LowRank()}, "scheme.side: null"),
        ("vllm", {"side": LowRank()}, "scheme.side: null"),
        ("onnxruntime", {"weights": MXFP4Plus()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform}"),
        ("llama.cpp", {"weights": NVINT4()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform"),
        ("vllm", {"weights": NVINT4()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform}"),
        ("vllm", {"weights": MXFP4()}, "scheme.weights: {class_path: kurtail_pl.methods.Uniform}"),
        ("vllm", {"weights": Uniform(3)}, "scheme.weights.bits: 4"),
        ("vllm", {"weights": Uniform(symmetric=False)}, "scheme.weights.symmetric: true"),
        ("vllm", {"weights": Uniform(group_size=128)}, "scheme.weights.group_size: null"),
        ("vllm", {"activations": Quantizer(8, group_size=128)}, "scheme.activations.group_size: null"),
        ("vllm", {"activations": Quantizer(4, group_size=32)}, "scheme.activations.group_size: 128"),
        ("vllm", {"activations": Quantizer(6)}, "scheme.activations.bits: 4"),
        ("vllm", {"activations": Quantizer(4, symmetric=False)}, "scheme.activations.symmetric: true"),
        ("vllm", {"activations": Quantizer(4, clip=Clip(amount=0.9))}, "scheme.activations.clip.amount: 1.0"),
        ("vllm", {"attention_output": "head"}, "scheme.attention_output: token"),
        ("vllm", {"activation_scales": "static"}, "scheme.activation_scales: token"),
        ("vllm", {"cache": PerTokenHead()}, "scheme.cache: null (16 bits)"),
        ("vllm", {"centre": True}, "scheme.centre: false"),
    ],
)
def test_what_a_runtime_lacks_is_refused_by_its_setting(name: TargetName, change: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError, match=f"target is {name}, and ") as refused:
        TARGETS[name].require(replace(FITS[name], **change), None)
    assert f"write quantization.{setting}" in str(refused.value) or setting in str(refused.value)
    assert f"or put the recipe {TARGETS[name].recipe} over this one" in str(refused.value)
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("weights", [MXFP4(), NVFP4(), Uniform(8, scales="float16"), Uniform(4, False, 32, "float16")])
def test_llama_cpp_has_other_blocks_too(weights: Any) -> None:
    TARGETS["llama.cpp"].require(replace(FITS["llama.cpp"], weights=weights), None)


def test_onnx_multiplies_two_levels_of_scales() -> None:
    for weights in (Progressive(32), NVINT4()):
        TARGETS["onnxruntime"].require(replace(FITS["onnxruntime"], weights=weights), None)


@pytest.mark.parametrize("name", ["llama.cpp", "vllm"])
def test_clips_of_each_site_are_refused(name: TargetName) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.clips: null"):
        TARGETS[name].require(FITS[name], SearchedClips())
    TARGETS["torch"].require(Scheme(), SearchedClips())


@pytest.mark.parametrize(
    ("name", "kept", "numbers"),
    [
        ("torch", ONLINE, None),
        ("onnxruntime", ONLINE, None),
        ("llama.cpp", (), "R3 (query_key) and R4 (attention_output) and R5 (mlp_hidden)"),
        ("vllm", ("attention_output", "mlp_hidden"), "R3 (query_key)"),
    ],
)
def test_rotations_at_run_time(name: TargetName, kept: tuple[Any, ...], numbers: str | None) -> None:
    TARGETS[name].require_online(kept)
    if numbers is None:
        return
    with pytest.raises(ConfigError) as refused:
        TARGETS[name].require_online(ONLINE)
    assert f"does not compute {numbers} at run time: write fusion.online: [{', '.join(kept)}]" in str(refused.value)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "torch"])
def test_rotations_of_block_inputs_run_in_torch_alone(name: TargetName) -> None:
    TARGETS["torch"].require_online((), block_inputs=True)
    with pytest.raises(ConfigError, match=rf"target is {name}, which does not turn block inputs.*write target: torch"):
        TARGETS[name].require_online((), block_inputs=True)


def test_inputs_of_llama_cpp_are_ggmls_q8_0() -> None:
    """But for the type of the scale: float16 there, which is 2^-11 of a value from the next."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 3
    stored = gguf_quantize(x.numpy(), GGMLQuantizationType.Q8_0)
    theirs = dequantize(stored, GGMLQuantizationType.Q8_0).astype(np.float64)
    ours = fake_quantize(x, INT8).double().numpy()
    assert np.abs(ours - theirs).max() <= np.abs(theirs).max() * 2.0**-11


def test_every_rule_names_its_source() -> None:
    for target in TARGETS.values():
        for rule in target.rules:
            assert all(rule)
