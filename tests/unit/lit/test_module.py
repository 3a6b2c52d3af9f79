"""The rotation module in a real trainer, against SciPy and against rotations that learn alone."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError, NotFinite, ResumeMismatch
from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.kurtail import Objective
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.optim import CayleyAdam, CayleySGD
from kurtail_pl.stages.capture.effects import block_effects
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.capture.weight_rows import weight_rows
from kurtail_pl.stages.text import TextSpec, cut_windows

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Precision 16-mixed is not supported|.*float16 is not supported on CPU"),
]
EPS = 1e-2
SIZES = ModelSizes(layers=3, hidden_size=16, head_dim=4, kv_heads=2, rms_norm_eps=EPS)
MakeTrainer = Callable[..., L.Trainer]


def module_of(lr: float = 0.3, **changes: Any) -> KurTailModule:
    return KurTailModule(**{"sizes": SIZES, **changes}, optimizer=lambda parameters: CayleyAdam(parameters, lr=lr))


def loader_of(known: Any, steps: int = 10, batch_rows: int = 20) -> BlockLoader:
    return BlockLoader(known.store, batch_rows, steps, seed=1, first_row=0, last_row=100)


class Record(L.Callback):
    """What was logged, and the rotations, after each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.rotations: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.rotations.append((module.residual.detach().clone(), module.value.detach().clone()))


def train(make_trainer: MakeTrainer, module: KurTailModule, loader: BlockLoader, **settings: Any) -> Record:
    record = Record()
    make_trainer(callbacks=[record], **settings).fit(module, loader)
    return record


def scipy_kurtosis(values: np.ndarray) -> float:
    return float(scipy.stats.kurtosis(values, axis=None, fisher=False, bias=True))


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


def written_out(objective: str, row: np.ndarray) -> float:
    """What one row has of the objective."""
    if objective == "range":
        return float(np.ptp(row)) ** 2
    if objective == "whip":
        return float(np.exp(-np.abs(row)).sum())
    if objective == "token_kurtosis":
        return abs(scipy_kurtosis(row) - 1.8)
    uniform = row.mean() + row.std() * np.sqrt(3) * ((2 * np.arange(len(row)) + 1) / len(row) - 1)
    return float(((np.sort(row) - uniform) ** 2).mean())


def weighted_kurtosis(rows: np.ndarray, weights: np.ndarray) -> float:
    """Of rows that are repeated as often as their weight says."""
    return scipy_kurtosis(np.repeat(rows, weights, axis=0))


@pytest.mark.parametrize("objective", ["kurtosis", "token_kurtosis", "range", "whip", "wasserstein"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("massive_weight", [0, 1, 5])
def test_the_loss_of_r1_is_its_objective_written_out(
    known: Any, objective: str, centre: bool, massive_weight: int
) -> None:
    module = module_of(objective=Objective(objective, massive_weight), aim=Aim(Scheme(centre=centre)))
    batch = massive(loader_of(known).batch(0))
    r1, rows = module.residual.detach().double().numpy(), batch["residual"].double().numpy()
    norms = np.linalg.norm(rows, axis=-1)
    expected, kurtoses = [], []
    for site, norm in zip(rows, norms, strict=True):
        normed = site / np.sqrt((site**2).mean(-1, keepdims=True) + EPS)
        large = norm > 10 * np.median(norm)
        assert large.sum() == 2
        turned = (normed - normed[~large].mean(0) * centre) @ r1
        weights = np.where(large, massive_weight, 1)
        kurtoses.append(weighted_kurtosis(turned, weights))
        if objective == "kurtosis":
            expected.append(abs(kurtoses[-1] - 1.8))
        else:
            expected.append(np.average([written_out(objective, row) for row in turned], weights=weights))
    losses, found, _ = module(batch)
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-4)
    np.testing.assert_allclose(found, kurtoses, rtol=1e-4)


def massive(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in which two tokens of every site are massive, and one-hot but for a little."""
    residual = batch["residual"].clone()
    residual[:, 3:5, 2] = 1000.0
    return {**batch, "residual": residual}


def test_an_unknown_objective_or_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'entropy'.*kurtosis, token_kurtosis, group_kurtosis, range, whip"):
        Objective("entropy")
    for target in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"target is {target}; no kurtosis is below 1"):
            Objective(target=target)
    with pytest.raises(ConfigError, match=r"target is 3.0 and objective.kind is 'range', which has none"):
        Objective("range", target=3.0)
    for name in ("massive_weight", "weight_term"):
        with pytest.raises(ConfigError, match=f"{name} is -1"):
            Objective(**{name: -1})


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


def test_attended_heads_share_the_r2_of_their_group(known: Any) -> None:
    batch = loader_of(known).batch(0)
    attended = torch.randn(3, 20, 6, 4, generator=torch.Generator().manual_seed(4)).exp()
    for per_head in (True, False):
        module = module_of(value_per_head=per_head)
        r2 = module.value.detach().double()
        r2 = r2 if per_head else r2.unsqueeze(1).expand(3, 2, 4, 4)
        turned = [[attended[layer, :, head].double() @ r2[layer, head // 3] for head in range(6)] for layer in range(3)]
        groups = [[scipy_kurtosis(torch.stack(heads[k : k + 3]).numpy()) for k in (0, 3)] for heads in turned]
        whole = [scipy_kurtosis(torch.stack(heads).numpy()) for heads in turned]
        _, _, found = module({**batch, "value": attended})
        np.testing.assert_allclose(found[0].detach(), groups if per_head else whole, rtol=1e-4)


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


def first_step(
    model: Path, text: TextSpec, make_trainer: MakeTrainer, store: Path, **changes: Any
) -> tuple[ActivationDataModule, Record, np.ndarray]:
    """The data of a real model, what the first step logged, and R1 before it."""
    data = ActivationDataModule(CaptureSpec(str(model), text, rows=100, seed=2), str(store), 1, 64, 20)
    module, record = module_of(1e-12, sizes=data.sizes, objective=Objective(**changes)), Record()
    make_trainer(callbacks=[record], limit_val_batches=0).fit(module, datamodule=data)
    return data, record, module.residual.detach().double().numpy()


@pytest.mark.usefixtures("cache")
def test_sites_count_by_their_effect(tiny: Path, text_file: Path, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    text = TextSpec(str(text_file), windows=4, seqlen=32)
    data, record, r1 = first_step(tiny, text, make_trainer, tmp_path / "store", site_weights="effect")
    windows = cut_windows(data.checkpoint, text, "calibration", seed=2)
    effects = block_effects(data.checkpoint, windows.tokens, seed=2).numpy()
    rows = data.train_dataloader().batch(0)["residual"].double().numpy()
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + data.sizes["rms_norm_eps"])
    losses = [abs(scipy_kurtosis(x @ r1) - 1.8) for x in normed]
    assert record.metrics[0]["loss/r1"] == pytest.approx(np.average(losses, weights=effects), rel=1e-4)
    assert np.average(losses, weights=effects) != pytest.approx(np.mean(losses), rel=1e-2)


def test_the_weights_term_is_the_objective_of_their_rows(
    tiny: Path, text_file: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    text = TextSpec(str(text_file), windows=4, seqlen=32)
    data, record, r1 = first_step(tiny, text, make_trainer, tmp_path / "store", kind="range", weight_term=0.5)
    rows = weight_rows(data.checkpoint, 256, seed=2).double().numpy()
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True))
    logged, expected = record.metrics[0], np.mean(np.ptp(rows @ r1, axis=-1) ** 2)
    assert logged["loss/weights"] == pytest.approx(expected, rel=1e-4)
    assert logged["loss/total"] == pytest.approx(logged["loss/r1"] + logged["loss/r2"] + expected / 2, rel=1e-4)


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
