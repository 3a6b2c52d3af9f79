"""R4 and R5 in blocks against transformers' own logits, scipy's matrices, and what the channels hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_family
from logits import change
from scipy.linalg import block_diag, hadamard
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import kurtail_pl
from kurtail_pl.errors import CheckpointError, ConfigError
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.callbacks import Fusion
from kurtail_pl.lit.fixed import FixedRotations
from kurtail_pl.lit.kurtail import KurTailModule
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.rotation_file import FILE, hash_of, read_rotations
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import BlockSize, Rotations, random_rotations

pytestmark = pytest.mark.usefixtures("cache")


def in_blocks(folder: Path, block_size: BlockSize) -> Path:
    rotations = random_rotations(AutoConfig.from_pretrained(folder), 3, block_size)
    return fuse(Checkpoint(folder), rotations, "quarot", folder.parent / f"fused-{folder.name}-{block_size}")


@pytest.mark.parametrize("block_size", ["widest", 4])
@pytest.mark.parametrize("family", ["llama3", "phi3", "mixtral", "apertus"])
def test_logits_are_the_originals(tmp_path: Path, vocabulary: Path, family: str, block_size: BlockSize) -> None:
    """Also where one linear makes gate and up, or query, key and value, where experts are many, and without a gate."""
    folder = tmp_path / family
    tiny_family(family).save_pretrained(folder)
    for file in vocabulary.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert change(folder, in_blocks(folder, block_size)) < 1e-4


def test_signs_with_nowhere_to_go_are_refused(tmp_path: Path, vocabulary: Path) -> None:
    """xIELU stands between what writes R5's channels and R5: its blocks have no signs there."""
    tiny_family("apertus").save_pretrained(tmp_path)
    for file in vocabulary.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint(tmp_path)
    own = random_rotations(checkpoint.config, 3, "widest").mlp_hidden
    assert own is not None
    assert own.signs is None
    signed = Rotations(mlp_hidden=replace(own, signs=torch.ones(own.size)))
    with pytest.raises(CheckpointError, match=r"mlp_hidden has signs, and this apertus takes none: xIELU.* between"):
        fuse(checkpoint, signed, "quarot", tmp_path / "fused")


@pytest.fixture(scope="module")
def vocabulary(tiny: Path) -> Path:
    """A folder with a tokenizer."""
    return tiny


def test_the_hadamard_at_run_time_is_scipys(tiny: Path, tmp_path: Path) -> None:
    """Each width by its largest power of two."""
    fused = in_blocks(tiny, "widest")
    config, model = AutoConfig.from_pretrained(tiny), kurtail_pl.load(fused)
    widths = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
    for name, width in widths.items():
        block = width & -width
        dense = torch.from_numpy(block_diag(*[hadamard(block)] * (width // block))) / block**0.5
        (linear, *_) = [m for path, m in model.named_modules() if path.endswith(name)]
        assert isinstance(linear, QuantizedLinear)
        x = torch.randn(7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(linear.turn(x), x @ dense.double(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_r5s_signs_are_in_the_channels_that_it_turns(tiny: Path) -> None:
    """What down_proj reads before R5 is what the original's reads, but for the signs of the rotations' file."""
    fused = in_blocks(tiny, 2)
    rotations = read_rotations(fused / FILE)
    assert rotations.mlp_hidden is not None
    assert rotations.attention_output is not None
    signs = rotations.mlp_hidden.signs
    assert signs is not None
    assert set(signs.tolist()) == {1.0, -1.0}
    assert rotations.attention_output.signs is None
    ids = torch.arange(20)[None]
    models: list[nn.Module] = [AutoModelForCausalLM.from_pretrained(tiny), kurtail_pl.load(fused)]
    seen = []
    for model in models:
        down = model.get_submodule("model.layers.2.mlp.down_proj")
        down.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(ids)
    original, ours = seen
    assert torch.allclose(original * signs.float(), ours, rtol=0, atol=1e-4 * float(original.abs().max()))


def test_r2_does_not_end_at_the_identity_behind_r4() -> None:
    """R4 in blocks of a head is a Hadamard without signs, and R2 without learning one with signs on one side."""
    sizes = ModelSizes(layers=2, hidden_size=32, head_dim=16, kv_heads=1, rms_norm_eps=1e-6)
    plain = torch.from_numpy(hadamard(16)).double() / 4
    for aim, mixed in ((Aim(), False), (Aim(block_size=16), True)):
        for module in (KurTailModule(sizes, aim=aim), FixedRotations(sizes, aim=aim)):
            both = module.value.detach().double() @ plain
            entries = (both.abs() > 1e-6).sum(-1)
            assert bool((entries > 1).all()) == mixed


def test_files_hold_blocks_and_signs(tiny: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    four, two = (random_rotations(config, 3, size) for size in (4, 2))
    read = read_rotations(in_blocks(tiny, 4) / FILE)
    assert read.mlp_hidden is not None
    assert four.mlp_hidden is not None
    assert torch.equal(read.mlp_hidden.dense(), four.mlp_hidden.dense())
    assert hash_of(read) == hash_of(four) != hash_of(two)
    other = replace(four, mlp_hidden=replace(four.mlp_hidden, signs=torch.ones(7)))
    with pytest.raises(CheckpointError, match="mlp_hidden has size 0"):
        fuse(Checkpoint(tiny), other, "quarot", tmp_path / "never")


def test_an_artefact_loads_as_it_was_measured(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """Codes and all, and the rotations' own signs among several draws."""
    rotations = random_rotations(AutoConfig.from_pretrained(tiny), 3, "widest")
    signs = SignSpec(candidates=4, text=text)
    fused = fuse(Checkpoint(tiny), rotations, "quarot", tmp_path / "fused", signs=signs)
    chosen = read_rotations(fused / FILE).origin["signs"]
    assert list(chosen["chosen"]) == ["mlp_hidden"]
    assert len(set(chosen["errors"]["mlp_hidden"])) == 4
    assert change(tiny, fused) < 1e-4
    artefact = quantize(fused, QuantizeSpec(text=text), tmp_path / "artefact")
    ids = torch.arange(24)[None]
    again = [kurtail_pl.load(artefact)(ids).logits for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("block_size", "message"),
    [(32, r"block_size is 32, and R4 turns \d+ channels.*from 2 to \d+, widest, or null"), (6, "power of two")],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, block_size: int, message: str) -> None:
    config = tiny_family("llama3", num_attention_heads=3, num_key_value_heads=3, head_dim=16).config
    with pytest.raises(ConfigError, match=message):
        random_rotations(config, 0, block_size)


def test_blocks_of_rotations_that_are_left_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fusion\.block_size is the size of R4 and R5, and fusion\.online is \[\]"):
        Fusion(online=[], block_size="widest")
