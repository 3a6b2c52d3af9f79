"""What vLLM does not compute is refused before anything is written, by the setting to change."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kurtail_vllm.exporter import VLLM

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import (
    FloatZero,
    LowRank,
    Normal,
    NUQCache,
    PerTokenHead,
    Q4_0Cache,
    SearchedClips,
    Sinks,
    Uniform,
)
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
A4, A8 = Quantizer(4), Quantizer(8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weights": None, "activations": A4}, "the weights are float: quantize them"),
        ({"weights": Normal(group_size=4)}, "evenly spaced integers .* kurtail_pl.methods.Uniform"),
        ({"weights": FloatZero(4, False, group_size=64)}, "integer zero points alone"),
        ({"weights": Uniform(3)}, "q_proj has weights of 3 bits; vLLM's kernels read 4 and 8"),
        ({"layer_bits": [4, 2, 8]}, r"layers\.1\.self_attn\.q_proj has weights of 2 bits"),
        ({"activations": A4, "centre": True}, "quantize with centre: false"),
        ({"side": LowRank(4)}, "a side of rank 4 in 16 bits, .* vLLM does not add: quantize with side: null"),
        ({"prefix": [5, 7]}, r"prefix is \[5, 7\].*quantize with prefix: null"),
        ({"cache": PerTokenHead(sinks=Sinks(2, 8))}, "quantize with sinks: null"),
        ({"cache": PerTokenHead(centre_keys=True)}, "quantize with centre_keys: false"),
        (
            {"cache": PerTokenHead(values=Quantizer(levels="e2m1"))},
            "cache keeps numbers in 4-bit floating .*integer and",
        ),
        ({"cache": Q4_0Cache()}, "no cache like keys and values in Q4_0"),
        ({"cache": NUQCache()}, "no cache like keys before RoPE by channel in 4 bits"),
        ({"activations": Quantizer(4, clip=Clip(amount=0.9))}, r"ratio 0\.9; .*with activations\.clip\.amount: 1\.0"),
        ({"activations": Quantizer(4, clip=Clip("quantile", 0.98))}, r"quantile 0\.98; .*clip\.amount: 1\.0"),
        (
            {"activations": A4, "tuner": SearchedClips(["activations"])},
            r"with clips: null and activations\.clip\.amount: 1\.0",
        ),
        ({"activations": Quantizer(4, symmetric=False)}, r"quantize with activations\.symmetric: true"),
        (
            {"activations": Quantizer(levels="e2m1", scales="e8m0")},
            "are 4-bit floating point .*levels: integer and scales",
        ),
        ({"activations": Quantizer(6)}, "activations have 6 bits; vLLM has 4 and 8"),
        (
            {"activations": A4, "activation_scales": "static"},
            "activation_scales is static; .*quantize with token, or export",
        ),
        ({"weights": Uniform(4, False), "activations": A4}, r"quantize with weights\.symmetric: true"),
        ({"weights": Uniform(8), "activations": A4}, "quantize with weights.bits 4"),
        ({"weights": Uniform(4, group_size=32), "activations": Quantizer(4, group_size=32)}, "takes 64 and more"),
        ({"weights": Uniform(4, group_size=64), "activations": A4}, r"or activations\.group_size: 64"),
        ({"weights": Uniform(4, group_size=64), "activations": A8}, "leaves float then: .* group_size: null"),
    ],
    ids=str,
)
def test_schemes(llama: Path, make_artefact: MakeArtefact, tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    artefact = make_artefact(llama, halved=False, **parts)
    with pytest.raises(ConfigError, match=message):
        export(artefact, tmp_path / "vllm", VLLM())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "online", "parts", "message"),
    [
        (
            {},
            True,
            {},
            r"o_proj has a bias and an online rotation, .*leave attention_output out of fusion\.online",
        ),
        ({"attention_bias": False}, True, {}, r"down_proj has a bias .*leave mlp_hidden out of fusion\.online"),
        ({}, False, {"activations": A4}, "q_proj is 96 x 48; .*takes multiples of 8 x 32: .*--to.activations none"),
        ({}, False, {"weights": Uniform(4, False)}, r"gate_proj has 172 outputs .*weights\.symmetric: true"),
    ],
    ids=str,
)
def test_models(
    make_model: Callable[..., Path],
    make_artefact: MakeArtefact,
    tmp_path: Path,
    changes: dict[str, Any],
    online: bool,
    parts: dict[str, Any],
    message: str,
) -> None:
    artefact = make_artefact(make_model("llama3", **changes), online, **parts)
    with pytest.raises(ConfigError, match=message):
        export(artefact, tmp_path / "vllm", VLLM())


def test_mixtures(make_model: Callable[..., Path], make_artefact: MakeArtefact) -> None:
    model = make_model("mixtral")
    online, quantized = (make_artefact(model, online, activations=A8) for online in (True, False))
    assert "mlp_hidden rotates what experts read" in (VLLM(activations="none").refuses(Source(online)) or "")
    assert "export with --to.activations none" in (VLLM().refuses(Source(quantized)) or "")
    assert VLLM(activations="none").refuses(Source(quantized)) is None


def test_what_float_activations_do_not_need_is_not_refused(llama: Path, make_artefact: MakeArtefact) -> None:
    for parts in ({"activation_scales": "static"}, {"attention_output": "head"}, {}):
        activations = Quantizer(4, "static" in str(parts), Clip(amount=0.9))
        source = Source(make_artefact(llama, activations=activations, **parts))
        assert VLLM().refuses(source) is not None
        assert VLLM(activations="none").refuses(source) is None


def test_float32_has_no_kernel_for_quantized_activations(online: Path) -> None:
    reason = VLLM("float32").refuses(Source(online))
    assert reason is not None
    assert re.search("export with --to.dtype float16, or export with --to.activations none", reason)
    assert VLLM("bfloat16").refuses(Source(online)) is None
