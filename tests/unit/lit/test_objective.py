"""Objectives of R1 and R2, written out with NumPy and SciPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rotation_modules import EPS, MakeTrainer, Record, loader_of, module_of, scipy_kurtosis
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit import ActivationDataModule
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.kurtail import Objective
from kurtail_pl.methods.scheme import Scheme
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
