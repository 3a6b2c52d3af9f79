"""R1 of each block input by itself, against dense matrices that learn alone."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from rotation_modules import EPS, SIZES, MakeTrainer, loader_of, module_of
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.lit.spinquant import SpinQuantModule
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.surgery.misfits import misfits

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
APART: ModelSizes = {**SIZES, "rigid_residual": "norms stand behind the blocks"}


def distance(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Of the kurtosis of normed rows behind the whole matrix from 1.8."""
    normed = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt()
    turned = normed @ torch.kron(left, right)
    deviation = turned - turned.mean()
    return ((deviation**4).mean() / (deviation**2).mean() ** 2 - 1.8).abs()


def test_each_block_input_learns_as_alone(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of(0.3, sizes=APART)
    assert module.inputs is not None
    starts = [module.inputs.left.detach().double(), module.inputs.right.detach().double()]
    make_trainer(precision="64-true").fit(module, loader_of(known))
    for site in range(6):
        factors = [stack[site].clone().requires_grad_() for stack in starts]
        optimizer = CayleyAdam(factors, lr=0.3)
        for step in range(10):
            rows = loader_of(known).batch(step)["residual"][site].double()
            gradients = torch.autograd.grad(distance(rows, *factors) / 6, factors)
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            optimizer.step()
        for stack, factor in zip((module.inputs.left, module.inputs.right), factors, strict=True):
            torch.testing.assert_close(stack[site].detach(), factor.detach(), rtol=0, atol=1e-9)
        assert (factors[0] - starts[0][site]).abs().max() > 0.02


def test_what_is_learned_fits_its_family_and_is_orthogonal() -> None:
    config = FAMILIES["gemma3"]()
    sizes = ModelSizes(layers=3, hidden_size=48, head_dim=16, kv_heads=2, rms_norm_eps=1e-6, rigid_residual="norms")
    found = module_of(sizes=sizes).rotations(config)
    assert found.residual is None
    assert found.block_input is not None
    assert misfits(found, config) == []
    for site in range(6):
        whole = found.block_input.of(site).dense()
        assert torch.allclose(whole @ whole.T, torch.eye(48, dtype=torch.float64), atol=1e-12)


def test_spinquant_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"does not allow: norms stand behind the blocks; learn with KurTail"):
        SpinQuantModule(APART)
