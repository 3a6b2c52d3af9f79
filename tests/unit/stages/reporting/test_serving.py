"""What artefacts take where they are used: against torch's own counter, by hand, and by the exports themselves.

The tiny model has 4 layers, 6 heads and 2 KV heads of 16, 48 channels in the residual stream and 172 in the MLP.
"""

import re
from pathlib import Path

import pytest
import torch
from families import tiny_family
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.cli.export import exporter_named
from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import RTN, BlockTransforms, Int4PerTokenHead, LowRank, PerTokenHead, Q4_0Cache
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.reporting.serving import serving_of
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations

LAYERS = 4
WEIGHTS = 48 * (96 + 32 + 32) + 96 * 48 + 3 * 48 * 172
OUTPUTS = 96 + 32 + 32 + 48 + 172 + 172 + 48
# R3 is 4 x 4 on each of 8 heads, R4 is 12 x 8, R5 is 43 x 4.
ROTATIONS = 8 * 16 * (4 + 4) + 96 * (12 + 8) + 172 * (43 + 4)
SIDE = 3 * ((48 + 160) + (96 + 48) + (48 + 344) + (172 + 48))
"""Numbers of sides of rank 3 in a layer: of what three read, the output projection, gate and up, down."""
IDS = torch.arange(11)[None]


def products(folder: Path) -> int:
    """Multiplications of a float model as torch counts them, for each token."""
    model = (
        kurtail_pl.load(folder) if (folder / "kurtail.json").is_file() else AutoModelForCausalLM.from_pretrained(folder)
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS)
    operations: int = counter.get_total_flops()
    assert operations % (2 * IDS.numel()) == 0
    return operations // (2 * IDS.numel())


def test_rotations_at_run_time_are_counted_as_torch_counts_them(tiny: Path, fused: Path) -> None:
    found = serving_of(fused, {})
    assert found.multiplications == products(fused) - products(tiny) == LAYERS * ROTATIONS
    assert found.own == LAYERS * WEIGHTS
    assert (found.weight_bits, found.cache_bits) == (16, 16)


def test_of_a_mixture_the_experts_count_that_a_token_meets(tiny: Path, tmp_path: Path) -> None:
    plain = tmp_path / "model"
    tiny_family("mixtral").save_pretrained(plain)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(plain)
    checkpoint = Checkpoint(plain)
    config = checkpoint.config
    assert config.num_experts_per_tok < config.num_local_experts
    folder = fuse(checkpoint, random_rotations(config, 0), "quarot", tmp_path / "fused")
    unturned = fuse(checkpoint, random_rotations(config, 0).keeping([]), "quarot", tmp_path / "unturned")
    found = serving_of(folder, {})
    assert found.multiplications == products(folder) - products(unturned) > 0
    head = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    expert = 3 * config.intermediate_size
    each = config.hidden_size * (head + config.num_experts_per_tok * expert)
    assert found.own == config.num_hidden_layers * each


def test_scales_and_sides_are_counted(fused: Path, artefact: Path, text: TextSpec, tmp_path: Path) -> None:
    plain = serving_of(artefact, {})
    # A float32 for each output; for each token and head of 16 a float32 and a byte.
    assert plain.weight_bits == pytest.approx(4 + 32 * OUTPUTS / WEIGHTS)
    assert plain.cache_bits == pytest.approx(4 + 40 / 16)
    assert plain.multiplications == LAYERS * ROTATIONS
    folder = quantize(fused, QuantizeSpec(Scheme(side=LowRank(3)), RTN(), text=text), tmp_path / "beside")
    found = serving_of(folder, {})
    assert found.weight_bits == pytest.approx(4 + (32 * OUTPUTS + 16 * SIDE) / WEIGHTS)
    assert found.multiplications == LAYERS * (ROTATIONS + SIDE)


def test_caches_that_turn_keys_and_values_multiply_for_all_heads() -> None:
    """Queries with the keys, outputs with the values: 9 heads and 3 KV heads of 64, or of 192 in blocks of 64."""
    assert PerTokenHead().multiplications(9, 3, 64) == 0
    assert Q4_0Cache().multiplications(9, 3, 64) == Int4PerTokenHead().multiplications(9, 3, 64) == 2 * 12 * 64 * 64
    assert Q4_0Cache(values=False).multiplications(9, 3, 192) == 12 * 192 * 64
    assert Q4_0Cache().multiplications(9, 3, 32) == 0  # llama.cpp leaves heads alone that 64 does not divide.


def test_learned_maps_are_counted_once_for_all_that_read_the_same(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    plain = fuse(Checkpoint(tiny), Rotations(), "none", tmp_path / "plain")
    tuner = BlockTransforms(["transforms"], epochs=1, windows=2, seqlen=24)
    scheme = Scheme(weights=None)
    spec = QuantizeSpec(scheme, RTN(), transforms=tuner, text=text, quantized_activations=True)
    folder = quantize(plain, spec, tmp_path / "mapped")
    found = serving_of(folder, {})
    # 6 x 8, 6 x 16, 6 x 8 and 4 x 43; and a matrix of 16 for each head of queries and keys.
    each = 48 * (6 + 8) + 96 * (6 + 16) + 48 * (6 + 8) + 172 * (4 + 43) + 8 * 16 * (1 + 16)
    assert found.multiplications == products(folder) - products(tiny) == LAYERS * each


@pytest.mark.parametrize("name", ["onnx", "gguf", "vllm"])
def test_a_runtime_takes_what_its_export_writes(name: str, fused: Path, artefact: Path, tmp_path: Path) -> None:
    """Each refusal is that of `kurtail export`, and where there is none it writes files."""
    pytest.importorskip({"onnx": "onnx_ir", "gguf": "gguf", "vllm": "torch"}[name])
    exporter = exporter_named(name)()
    for number, folder in enumerate((fused, artefact)):
        found = serving_of(folder, {name: exporter, "another": "not installed"})
        assert found.refusals["another"] == "not installed"
        out, reason = tmp_path / str(number), found.refusals[name]
        assert found.runtimes == ["torch", *([name] if reason is None else [])]
        if reason is None:
            assert list(export(folder, out, exporter, check=False).iterdir())
        else:
            with pytest.raises(ConfigError, match=re.escape(reason)):
                export(folder, out, exporter, check=False)
