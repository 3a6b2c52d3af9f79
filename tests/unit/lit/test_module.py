"""The rotation module in a real trainer, against SciPy and against rotations that learn alone."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rotation_modules import EPS, SIZES, MakeTrainer, loader_of, module_of, scipy_kurtosis, train
from torch import Tensor

from kurtail_pl.errors import ConfigError, NotFinite, ResumeMismatch
from kurtail_pl.lit import KurTailModule
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.kurtail import Objective
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.optim import CayleyAdam, CayleySGD

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Precision 16-mixed is not supported|.*float16 is not supported on CPU"),
]


def rotated_kurtosis(batch: dict[str, Tensor], module: KurTailModule) -> tuple[list[float], list[float]]:
    """Of every block input after RMSNorm and R1, and of every layer's values after its R2."""
    r1, r2 = module.residual.detach().double().numpy(), module.value.detach().double().numpy()
    residual, value = batch["residual"].double().numpy(), batch["value"].double().numpy()
    normed = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + EPS)
    return [scipy_kurtosis(x @ r1) for x in normed], [scipy_kurtosis(x @ r) for x, r in zip(value, r2, strict=True)]


def torch_distance(values: Tensor) -> Tensor:
    """|E[(x - mu)^4] / E[(x - mu)^2]^2 - 1.8|, written out."""
    deviation = values - values.mean()
    return ((deviation**4).mean() / (deviation**2).mean() ** 2 - 1.8).abs()


def learn_alone(start: Tensor, losses: list[Callable[[Tensor], Tensor]], lr: float) -> Tensor:
    """Where one matrix arrives when only its own loss is differentiated."""
    matrix = start.clone().requires_grad_()
    optimizer = CayleyAdam([matrix], lr=lr)
    for loss in losses:
        (matrix.grad,) = torch.autograd.grad(loss(matrix), matrix)
        optimizer.step()
    return matrix.detach()


def loss_alone(batch: dict[str, Tensor], layer: int | None) -> Callable[[Tensor], Tensor]:
    """Of R1 (no layer) on one batch, or of one layer's R2."""
    if layer is not None:
        return lambda r2: torch_distance(batch["value"][layer].double() @ r2)
    rows = batch["residual"].double()
    normed = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt()
    return lambda r1: torch.stack([torch_distance(site @ r1) for site in normed]).mean()


def rounding_error(residual: Tensor, module: KurTailModule) -> float:
    """Of 4 bits symmetric per row, relative, mean over sites of what R1 makes of the normed rows."""
    rows = residual.double().numpy()
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPS)
    errors = []
    for turned in normed @ module.residual.detach().double().numpy():
        step = np.abs(turned).max(-1, keepdims=True) / 7
        errors.append(((turned - step * np.round(turned / step)) ** 2).mean() / (turned**2).mean())
    return float(np.mean(errors))


@pytest.mark.parametrize("lr", [0.05, 1.5])
def test_together_equals_each_rotation_learned_alone(known: Any, make_trainer: MakeTrainer, lr: float) -> None:
    module = module_of(lr)
    starts = [module.residual.detach().double(), *module.value.detach().double()]
    train(make_trainer, module, loader_of(known), precision="64-true")
    batches = [loader_of(known).batch(step) for step in range(10)]
    for matrix, start, layer in zip([module.residual, *module.value], starts, [None, 0, 1, 2], strict=True):
        expected = learn_alone(start, [loss_alone(batch, layer) for batch in batches], lr)
        torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-9)
        assert (matrix - start).abs().max() > 0.02


def test_blocks_learn_as_each_would_with_an_optimizer_of_its_own(known: Any, make_trainer: MakeTrainer) -> None:
    """By the mean kurtosis of groups that share a scale, and a target of one's own; nothing grows between blocks."""
    quantizer = Quantizer(group_size=8, levels="e2m1", scales="e8m0")
    objective = Objective("group_kurtosis", target=3.56)
    module = module_of(0.3, objective=objective, block=4, aim=Aim(Scheme(activations=quantizer)))
    blocks = [block.clone() for block in module.residual.detach().double()]
    train(make_trainer, module, loader_of(known), precision="64-true")
    for block in blocks:
        block.requires_grad_()
    optimizers = [CayleyAdam([block], lr=0.3) for block in blocks]
    for step in range(10):
        rows = loader_of(known).batch(step)["residual"].double()
        normed = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt()
        turned = (normed @ torch.block_diag(*blocks)).view(6, 20, 2, 8)
        deviation = turned - turned.mean(-1, keepdim=True)
        each = (deviation**4).mean(-1) / (deviation**2).mean(-1) ** 2
        loss = (each.mean((1, 2)) - 3.56).abs().mean()
        for block, optimizer, gradient in zip(blocks, optimizers, torch.autograd.grad(loss, blocks), strict=True):
            block.grad = gradient
            optimizer.step()
    torch.testing.assert_close(module.residual.detach(), torch.stack(blocks).detach(), rtol=0, atol=1e-9)
    learned, value = module.learned()
    assert torch.equal(learned != 0, torch.block_diag(*torch.ones(4, 4, 4)) != 0)
    assert value.shape == (3, 4, 4)


def test_an_r2_for_each_head_sees_that_head_alone(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of(0.5, value_per_head=True)
    starts = module.value.detach().double()
    assert starts.shape == (3, 2, 4, 4)
    train(make_trainer, module, loader_of(known), precision="64-true")
    batches = [loader_of(known).batch(step)["value"].double() for step in range(10)]
    for layer, head in itertools.product(range(3), range(2)):
        losses = [lambda r2, x=batch[layer, :, head]: torch_distance(x @ r2) for batch in batches]
        expected = learn_alone(starts[layer, head], losses, 0.5)
        torch.testing.assert_close(module.value[layer, head].detach(), expected, rtol=0, atol=1e-9)
        assert (expected - starts[layer, head]).abs().max() > 0.02


def test_loss_is_equation_4_for_r1_plus_the_sum_over_r2(known: Any, make_trainer: MakeTrainer) -> None:
    module, batch = module_of(), loader_of(known).batch(0)
    k1, k2 = rotated_kurtosis(batch, module)
    logged = train(make_trainer, module, loader_of(known, steps=1)).metrics[0]
    loss_r1 = float(np.mean(np.abs(np.array(k1) - 1.8)))
    loss_r2 = float(np.sum(np.abs(np.array(k2) - 1.8)))
    expected = {
        "loss/total": loss_r1 + loss_r2,
        "loss": loss_r1 + loss_r2,
        "loss/r1": loss_r1,
        "loss/r2": loss_r2,
        "kurtosis/r1/mean": np.mean(k1),
        "kurtosis/r1/max": max(k1),
        "kurtosis/r2/mean": np.mean(k2),
        "kurtosis/r2/max": max(k2),
        "k_r1": np.mean(k1),
        "k_r2": np.mean(k2),
    }
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_losses_and_kurtosis_fall_and_rotations_stay_orthogonal(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of(lr=1.5)
    before = rotated_kurtosis({"residual": known.residual, "value": known.value}, module)
    record = train(make_trainer, module, loader_of(known, steps=60, batch_rows=50))
    after = rotated_kurtosis({"residual": known.residual, "value": known.value}, module)
    for k_before, k_after in zip(before, after, strict=True):
        assert np.mean(np.abs(np.array(k_after) - 1.8)) < 0.7 * np.mean(np.abs(np.array(k_before) - 1.8))
        assert np.mean(k_after) < np.mean(k_before)
    for name in ("loss/r1", "loss/r2", "loss/total"):
        losses = [metrics[name] for metrics in record.metrics]
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:2])
    for rotations in record.rotations:
        for matrix in rotations:
            error = matrix.double().mT @ matrix.double() - torch.eye(matrix.shape[-1]).double()
            assert error.abs().max() < 1e-5


def test_logged_orthogonality_is_the_largest_deviation(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of()
    with torch.no_grad():
        module.residual[0] *= 1.01
        module.value[1, 0] *= 1.02
    logged = train(make_trainer, module, loader_of(known, steps=1)).metrics[0]
    # The row times f adds (f^2 - 1) r_i r_j to X^T X; every entry of a Hadamard's row has the size 1/sqrt(n).
    assert logged["orthogonality/r1"] == pytest.approx((1.01**2 - 1) / 16, rel=1e-3)
    assert logged["orthogonality/r2"] == pytest.approx((1.02**2 - 1) / 4, rel=1e-3)


def test_start_is_a_random_hadamard_of_the_seed() -> None:
    first, again, other = module_of(rotation_seed=1), module_of(rotation_seed=1), module_of(rotation_seed=2)
    for matrix in (first.residual, *first.value):
        n = len(matrix)
        torch.testing.assert_close(matrix.detach().abs(), torch.full((n, n), n**-0.5))
        torch.testing.assert_close(matrix.detach().mT @ matrix.detach(), torch.eye(n), rtol=0, atol=1e-6)
    assert torch.equal(first.residual, again.residual)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.residual, other.residual)
    assert not torch.equal(first.value[0], first.value[1])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_wreck_orthogonality_are_refused(known: Any, make_trainer: MakeTrainer, precision: str) -> None:
    module = module_of()
    before = module.residual.detach().double()
    with pytest.raises(ConfigError, match=precision):
        make_trainer(precision=precision).fit(module, loader_of(known))
    torch.testing.assert_close(module.residual.detach().double(), before, rtol=0, atol=1e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_learn_nearly_the_same(known: Any, make_trainer: MakeTrainer, precision: str) -> None:
    usual, other = module_of(), module_of()
    train(make_trainer, usual, loader_of(known))
    train(make_trainer, other, loader_of(known), precision=precision)
    torch.testing.assert_close(other.residual.detach().float(), usual.residual.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(other.value.detach().float(), usual.value.detach(), rtol=0, atol=1e-4)


def test_a_loss_that_is_no_number_ends_the_training(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of()
    module.value.data[1, 2, 3] = float("nan")
    with pytest.raises(NotFinite, match=r"the loss is nan in step 1; .*optimizer\.lr"):
        train(make_trainer, module, loader_of(known))
    with pytest.raises(NotFinite, match="the learned rotations are nan"):
        module.learned()


def test_a_kurtosis_that_is_no_number_is_no_result() -> None:
    """Rows that are all alike have no spread to measure it by."""
    module, rows = module_of(), torch.randn(6, 20, 16, generator=torch.Generator().manual_seed(0))
    rows[3] = 1
    module.site_kurtosis.update(rows)
    with pytest.raises(NotFinite, match=r"kurtosis of layer001\.ffn_in is not finite"):
        module.on_validation_epoch_end()


def test_learned_rotations_are_orthogonal_in_float64(known: Any, make_trainer: MakeTrainer) -> None:
    module = module_of()
    train(make_trainer, module, loader_of(known))
    for learned, parameter in zip(module.learned(), (module.residual, module.value), strict=True):
        assert learned.dtype == torch.float64
        assert (learned.mT @ learned - torch.eye(learned.shape[-1]).double()).abs().max() < 1e-12
        torch.testing.assert_close(learned, parameter.detach().double(), rtol=0, atol=1e-5)


def test_validation_kurtosis_of_every_site_is_scipys(known: Any, make_trainer: MakeTrainer) -> None:
    module, trainer = module_of(), make_trainer()
    rows = BlockLoader(known.store, 5, 4, seed=0, first_row=100, last_row=120)
    for _ in range(2):  # the second pass forgets the first
        (reported,) = trainer.validate(module, rows, verbose=False)
    k1, _ = rotated_kurtosis({"residual": known.residual[:, 100:], "value": known.value[:, 100:]}, module)
    names = [f"layer{layer:03d}.{block}" for layer in range(3) for block in ("attn_in", "ffn_in")]
    expected = {f"kurtosis_site/{name}": value for name, value in zip(names, k1, strict=True)}
    expected |= {"kurtosis/validation/mean": np.mean(k1), "kurtosis/validation/max": max(k1)}
    expected["error/validation"] = rounding_error(known.residual[:, 100:], module)
    assert reported == pytest.approx(expected, rel=1e-4)


def test_the_recipes_optimizer_is_used() -> None:
    module = KurTailModule(SIZES, optimizer=lambda parameters: CayleySGD(parameters, lr=0.25))
    optimizer = module.configure_optimizers()
    assert type(optimizer) is CayleySGD
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(module.residual), id(module.value)]


def test_checkpoint_holds_plain_data_and_gives_the_module_back(
    known: Any, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module, trainer = module_of(), make_trainer()
    trainer.fit(module, loader_of(known))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["residual"], module.residual)
    assert torch.equal(saved["state_dict"]["value"], module.value)
    own = {"optimizer": lambda parameters: CayleyAdam(parameters, lr=module.configure_optimizers().defaults["lr"])}
    loaded = KurTailModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, sizes=SIZES, **own)
    assert torch.equal(loaded.residual, module.residual)
    other = {"optimizer": lambda parameters: CayleyAdam(parameters, lr=0.7)}
    with pytest.raises(ResumeMismatch, match=r"optimizer.lr is .*, wanted 0.7"):
        KurTailModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, sizes=SIZES, **other)


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"head_dim": 8}, {"layers": 2}])
def test_checkpoint_of_other_sizes_is_refused(
    known: Any, make_trainer: MakeTrainer, tmp_path: Path, changes: dict[str, int]
) -> None:
    trainer = make_trainer()
    trainer.fit(module_of(), loader_of(known, steps=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"\(16, 16\).*this model needs"):
        make_trainer().fit(module_of(sizes={**SIZES, **changes}), loader_of(known), ckpt_path=tmp_path / "a.ckpt")
