"""Artefacts of tiny models, with scales that float16 holds, and their exports."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("compressed_tensors")

from conftest import tiny_tokenizer
from families import tiny_family
from folders import with_half_scales

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import RTN, PerTokenHead, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import BlockSize, random_rotations

MakeArtefact = Callable[..., Path]
WEIGHTS_ALONE = Scheme(Uniform(4), activations=None, cache=None)
PLAIN = {"attention_bias": False, "mlp_bias": False}
WIDE = {
    **PLAIN,
    **{
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
"""Widths and heads that vLLM's kernel for quantized activations takes, and no biases beside transforms."""


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a family's tiny model, with a tokenizer; keyword arguments change its configuration."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("families") / family
        tiny_family(family, **changes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_artefact(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> MakeArtefact:
    """Rotate a model folder by random Hadamards, and round its weights.

    Fused rotations alone, or R4 and R5 too (`online`), of all channels or in blocks of a size.
    """
    fused: dict[tuple[Path, bool | BlockSize], Path] = {}

    def rotated(model: Path, online: bool | BlockSize) -> Path:
        if (model, online) not in fused:
            checkpoint, block_size = Checkpoint(model), None if isinstance(online, bool) else online
            rotations = random_rotations(checkpoint.config, 0, block_size).keeping(None if online else [])
            fused[model, online] = fuse(checkpoint, rotations, "quarot", tmp_path_factory.mktemp("fused") / "fused")
        return fused[model, online]

    def make(
        model: Path, online: bool | BlockSize = False, halved: bool = True, tuner: Any = None, **parts: Any
    ) -> Path:
        text = TextSpec(str(text_file), windows=2, seqlen=64)
        spec = QuantizeSpec(replace(WEIGHTS_ALONE, **parts), RTN(), clips=tuner, text=text, quantized_activations=True)
        artefact = quantize(rotated(model, online), spec, tmp_path_factory.mktemp("artefact") / "artefact")
        return with_half_scales(artefact) if halved else artefact

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama that vLLM's kernels take."""
    return make_model("llama3", **WIDE)


@pytest.fixture(scope="session")
def fused_only(llama: Path, make_artefact: MakeArtefact) -> Path:
    """Its artefact with weights of 4 bits, and no rotation at run time."""
    return make_artefact(llama)


@pytest.fixture(scope="session")
def online(llama: Path, make_artefact: MakeArtefact) -> Path:
    """Its artefact with weights, activations and cache of 4 bits, and all five rotations."""
    cache = Quantizer(4, symmetric=False)
    return make_artefact(llama, online=True, activations=Quantizer(4), cache=PerTokenHead(cache, cache))
