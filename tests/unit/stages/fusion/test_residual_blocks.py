"""R1 and R2 in blocks against scipy's matrices, transformers' own logits, and what lies outside of the blocks."""

import math
from pathlib import Path

import pytest
import torch
from families import tiny_family
from logits import change
from scipy.linalg import block_diag, hadamard
from torch import Tensor
from transformers import AutoConfig

from kurtail_pl.cli import verbs
from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.fixed import FixedRotations
from kurtail_pl.lit.kurtail import KurTailModule
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.methods import MXFP4, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.rotation_file import FILE, hash_of, read_rotations
from kurtail_pl.surgery.rotations import random_rotations

SIZES = ModelSizes(layers=2, hidden_size=48, head_dim=16, kv_heads=2, rms_norm_eps=1e-6)


def dense(width: int, block: int) -> Tensor:
    """Scipy's Hadamard matrices on the diagonal."""
    return torch.from_numpy(block_diag(*[hadamard(block)] * (width // block))).double() / math.sqrt(block)


@pytest.mark.parametrize("family", ["llama3", "phi3", "mixtral"])
def test_logits_are_the_originals(tmp_path: Path, tiny: Path, family: str) -> None:
    """R1 and R2 in blocks of 4, R5 in blocks of 4 at run time, no R4, for which R2 stands in."""
    folder = tmp_path / family
    tiny_family(family).save_pretrained(folder)
    for file in tiny.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    rotations = random_rotations(AutoConfig.from_pretrained(folder), 3, 4, 4).keeping(["query_key", "mlp_hidden"])
    assert change(folder, fuse(Checkpoint(folder), rotations, "quarot", tmp_path / "fused")) < 1e-4


@pytest.mark.parametrize("block", [4, 16])
def test_they_are_scipys_but_for_signs(tiny: Path, block: int) -> None:
    """Of what a head's channels lie in one block R2 is made."""
    config = AutoConfig.from_pretrained(tiny)
    found = random_rotations(config, 5, block=block)
    assert found.origin == {"seed": 5, "block": block}
    assert found.residual is not None
    assert found.value is not None
    assert torch.allclose(found.residual.abs(), dense(config.hidden_size, block).abs(), rtol=0, atol=1e-12)
    in_head = dense(config.head_dim, math.gcd(block, config.head_dim))
    for matrix, blocks in ((found.residual, dense(config.hidden_size, block)), *((r2, in_head) for r2 in found.value)):
        signs = matrix @ blocks
        assert torch.allclose(signs, torch.diag(signs.diagonal().sign()), rtol=0, atol=1e-12)
        assert len(set(signs.diagonal().sign().tolist())) == 2


def test_a_module_starts_from_the_models_own() -> None:
    """Parameters are the blocks; what is written has nothing between them."""
    config = tiny_family("llama3", hidden_size=48, head_dim=16, num_hidden_layers=2).config
    expected = random_rotations(config, 7, block=8)
    learned = KurTailModule(SIZES, rotation_seed=7, block=8)
    assert learned.residual.shape == (6, 8, 8)
    assert learned.value.shape == (2, 2, 8, 8)
    for module in (learned, FixedRotations(SIZES, rotation_seed=7, block=8)):
        found = module.rotations(config)
        for ours, theirs in ((found.residual, expected.residual), (found.value, expected.value)):
            assert ours is not None
            assert theirs is not None
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
            assert torch.equal(ours == 0, theirs == 0)
    by_head = KurTailModule(SIZES, rotation_seed=7, block=8, value_per_head=True)
    assert by_head.r2.shape == (2, 2, 16, 16)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (12, r"block is 12, and R1 turns 48 channels in blocks of a power of two.*from 2 to 16, or null"),
        (32, "block is 32, and R1 turns 48 channels"),
        (1, "block is 1, and R1"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FixedRotations(SIZES, block=block)


def test_groups_that_lie_across_blocks_are_refused() -> None:
    """Whole blocks in a group, or whole groups in a block, are fine."""
    for weights in (MXFP4(), Uniform(group_size=8), Uniform(group_size=4), Uniform()):
        FixedRotations(SIZES, aim=Aim(Scheme(weights=weights)), block=8)
    with pytest.raises(ConfigError, match="block is 8 and weights has groups of 12 inputs"):
        KurTailModule(SIZES, aim=Aim(Scheme(weights=Uniform(group_size=12))), block=8)


def test_blocks_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    """Of random Hadamards alone."""
    with pytest.raises(ConfigError, match="block is 8, which is for --method quarot"):
        verbs.fuse(str(tiny), tmp_path / "none", method="none", block=8)
    verbs.fuse(str(tiny), tmp_path / "fused", method="quarot", seed=3, block=4)
    expected = random_rotations(AutoConfig.from_pretrained(tiny), 3, block=4)
    assert hash_of(read_rotations(tmp_path / "fused" / FILE)) == hash_of(expected)


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="block is 8 and hadamard is false"):
        FixedRotations(SIZES, hadamard=False, block=8)
