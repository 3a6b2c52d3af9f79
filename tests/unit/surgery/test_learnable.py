"""The model that learns its rotations, against transformers' own logits and what exact rotations cannot do."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_family
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.methods import Uniform
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.learnable import make_learnable
from kurtail_pl.surgery.rotations import head_dim_of, random_fused, random_rotations

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))


TURNED = [name for name in FAMILIES if architecture_of(FAMILIES[name]()).rigid_residual is None]
"""Families that have an R1 in their weights."""


def fused(model: PreTrainedModel, per_head: bool = False) -> tuple[Tensor, Tensor]:
    """R1 and R2 as parameters."""
    config = model.config
    sizes = config.num_hidden_layers, config.hidden_size, head_dim_of(config), 7
    residual, value = random_fused(*sizes, config.num_key_value_heads if per_head else None)
    return residual.float().requires_grad_(), value.float().requires_grad_()


def learnable(folder: Path, scheme: Scheme, per_head: bool = False) -> tuple[PreTrainedModel, Tensor, Tensor]:
    model = whole_model(Checkpoint(folder))
    residual, value = fused(model, per_head)
    make_learnable(model, scheme, random_rotations(model.config, 7), residual, value)
    return model, residual, value


@pytest.mark.parametrize(("name", "per_head"), list(itertools.product(TURNED, [False, True])))
def test_rotated_logits_are_transformers_own(name: str, per_head: bool, tmp_path: Path) -> None:
    reference = tiny_family(name)
    reference.save_pretrained(tmp_path)
    model, *_ = learnable(tmp_path, FLOAT, per_head)
    with torch.no_grad():
        expected, found = reference(IDS).logits, model(IDS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama3", "phi3", "mixtral"])
def test_a_turn_changes_the_loss_through_the_quantizers_alone(name: str, tmp_path: Path) -> None:
    """Without them the gradient along the manifold is nothing, R^T G is symmetric; with them it is not."""
    tiny_family(name).save_pretrained(tmp_path)
    for scheme, moves in ((FLOAT, False), (Scheme(weights=None), True)):
        model, *rotations = learnable(tmp_path, scheme)
        logits = model(IDS).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        for rotation in rotations:
            assert rotation.grad is not None
            pulled = rotation.detach().mT @ rotation.grad
            along = (pulled - pulled.mT).norm() / rotation.grad.norm()
            assert along > 1e-2 if moves else along < 1e-4


def test_the_models_own_weights_do_not_learn(tiny: Path) -> None:
    model, residual, value = learnable(tiny, Scheme())
    model(IDS).logits.sum().backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert residual.grad is not None
    assert value.grad is not None


@pytest.mark.parametrize("group_size", [None, 16])
def test_weights_are_rounded_after_they_are_rotated(tiny: Path, group_size: int | None) -> None:
    """Few values in a group, none further than half a step from the rotated weight, and none where rounding is off."""
    plain, *_ = learnable(tiny, FLOAT)
    rounded, *_ = learnable(tiny, replace(FLOAT, weights=Uniform(4, group_size=group_size)))
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
        if group_size and "down" in name:
            continue
        path = f"model.layers.1.{name}"
        dense, coarse = (m.get_submodule(path).dense_weight().detach() for m in (plain, rounded))
        groups = coarse.view(len(coarse), -1, group_size or coarse.shape[1])
        originals = dense.view(groups.shape)
        for values, wanted in zip(groups.flatten(0, 1), originals.flatten(0, 1), strict=True):
            levels = values.unique()
            assert len(levels) <= 16
            step = levels.diff().min()
            inside = (wanted < levels.max()) & (wanted > levels.min())
            assert ((values - wanted).abs()[inside] <= 0.501 * step).all()
    assert not torch.equal(dense, coarse)


def test_a_tied_head_is_untied(tied: Path) -> None:
    model, *_ = learnable(tied, FLOAT)
    expected = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)


def test_turning_values_keeps_the_rows_before_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=generator))[0]
    turned = folding.turn_values(weight, rotation)
    assert torch.equal(turned[:4], weight[:4])
    torch.testing.assert_close(turned[4:], torch.block_diag(*rotation).T @ weight[4:])
