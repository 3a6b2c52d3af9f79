"""What a GGUF file cannot say is refused before anything is written, in a sentence that names what to change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ggufs import artefact_of, model_folder
from kurtail_gguf.exporter import GGUF
from kurtail_gguf.families import FAMILIES
from transformers import AutoTokenizer

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import NVFP4, FloatZero, Format, LowRank, Normal, Uniform
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

MakeArtefact = Callable[..., Path]
WEIGHTS: dict[str, tuple[Format, str]] = {
    "scales": (Uniform(), r"scales in float32 .*scheme\.weights\.scales: float16"),
    "groups": (Uniform(group_size=16, scales="float16"), r"groups of 16 .*group_size: null, or a multiple of 32"),
    "eight bits": (Uniform(8, False), r"asymmetric in 8 bits .*symmetric: true"),
    "levels": (
        Normal(),
        r"levels of the normal distribution .*class_path: kurtail_pl\.methods\.Uniform, MXFP4 or NVFP4",
    ),
    "zero points": (FloatZero(group_size=32), r"zero points in floating point.*scales: float16"),
}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"sliding_window": 24}, "sliding_window is 24 .*sliding_window: null"),
    "rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    "frequencies": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_type is 'llama3', which llama.cpp's qwen3 does not compute",
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.5,
            }
        },
        "attention_factor, mscale or truncate",
    ),
    "bias": ("qwen3", {"attention_bias": True}, r"o_proj has a bias, which llama\.cpp's qwen3 has no place for"),
    "heads": ("qwen2", {"head_dim": 16}, "6 heads of 16 and a hidden_size of 192"),
    "activation": ("llama3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "width": ("llama3", {"intermediate_size": 172}, "down_proj reads 172 channels .* blocks of 32"),
    "dense layer": ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 96}, "layer 1 is dense"),
    "weights of experts": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    "layers without rope": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, r"no_rope_layers is \[1, 0, 1, 1\]"),
}


def refused(artefact: Path, folder: Path, message: str, exporter: GGUF | None = None) -> bool:
    """Whether the export is refused so, and leaves nothing."""
    with pytest.raises(ConfigError, match=message):
        export(artefact, folder / "gguf", exporter or GGUF())
    return not any(folder.iterdir())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    weights, message = WEIGHTS[name]
    assert refused(make_artefact("qwen3", weights), tmp_path, message)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    family, changes, message = CONFIGURATIONS[name]
    assert refused(make_artefact(family, changes=changes), tmp_path, message)


@pytest.mark.parametrize(
    ("family", "changes"), [("phi3", {}), ("smollm3", {"num_attention_heads": 8})], ids=["phi3", "smollm3"]
)
def test_a_scale_for_the_whole_weight(
    family: str, changes: dict[str, Any], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(family, NVFP4(), changes)
    assert refused(artefact, tmp_path, r"one more scale for each whole weight.*kurtail_pl\.methods\.MXFP4")


def test_blocks_of_sixty_four(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    assert refused(make_artefact("qwen3", NVFP4()), tmp_path, "o_proj reads 96 channels .*NVFP4 has blocks of 64")


def test_a_centre_where_there_is_no_bias(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact("qwen3", activations=Quantizer(8), centre=True)
    assert refused(artefact, tmp_path, r"o_proj has a bias.*scheme\.centre: false")


def test_a_side(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact("llama3", side=LowRank(4))
    assert refused(artefact, tmp_path, r"a side of rank 4 in 16 bits, .* quantize with scheme\.side: null")


def test_a_prefix(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact("llama3", prefix=[5])
    assert refused(artefact, tmp_path, r"the tokens \[5\] stand before every text.*scheme\.prefix: null")


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ("attention_output", r"down_proj \(R5\)"),
        ("mlp_hidden", r"o_proj \(R4\)"),
        (None, r"o_proj \(R4\) and down_proj \(R5\)"),
    ],
)
def test_online_rotations(left: str | None, named: str, tiny: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "llama3", AutoTokenizer.from_pretrained(tiny))
    checkpoint = Checkpoint(model)
    rotations = random_rotations(checkpoint.config, 0)
    if left is not None:
        rotations = replace(rotations, **{left: None})
    fused = fuse(checkpoint, rotations, "quarot", tmp_path / "fused")
    (tmp_path / "out").mkdir()
    assert refused(fused, tmp_path / "out", rf"turns the inputs of {named} at run time.*online: \[query_key\]")


def test_an_unknown_family(make_artefact: MakeArtefact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of one's own is no architecture of llama.cpp."""
    artefact = make_artefact("llama3")
    monkeypatch.delitem(FAMILIES, "llama")
    message = GGUF().refuses(Source(artefact))
    assert message is not None
    assert message.startswith("the model is a llama, and GGUF files are written for mistral, mixtral, smollm3")


def test_rows_that_blocks_of_eight_bits_do_not_divide(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    text = TextSpec(str(text_file), windows=2, seqlen=32)
    model = model_folder(tmp_path / "model", "llama3", AutoTokenizer.from_pretrained(tiny), hidden_size=48)
    artefact = artefact_of(model, tmp_path, text, None)
    (tmp_path / "out").mkdir()
    assert refused(artefact, tmp_path / "out", "rows of 48 .*--to.embedding f16", GGUF(embedding="q8_0"))
    export(artefact, tmp_path / "out" / "gguf", GGUF(), check=False)
