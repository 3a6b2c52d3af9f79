"""The curves of a training against what a logger of Lightning is given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from kurtail_pl.lit import KurTailModule, curves
from kurtail_pl.lit.curves import Curves
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.lit.sizes import ModelSizes

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]
SIZES = ModelSizes(layers=3, hidden_size=16, head_dim=4, kv_heads=2, rms_norm_eps=1e-2)
STEPS = 12
MakeTrainer = Callable[..., L.Trainer]


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step + 1, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not wanted."""


def train(known: Any, make_trainer: MakeTrainer, steps: int = STEPS, **settings: Any) -> Curves:
    trainer = make_trainer(log_every_n_steps=1, **settings)
    loader = BlockLoader(known.store, 20, steps, seed=1, first_row=0, last_row=100)
    trainer.fit(KurTailModule(SIZES), loader)
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, Curves))  # type: ignore[attr-defined]
    return found


def test_curves_are_what_was_logged(known: Any, make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    found = train(known, make_trainer, logger=recorder)
    assert found.steps == list(range(1, STEPS + 1))
    assert found.values.keys() >= {"loss/total", "loss/r1", "loss/r2", "kurtosis/r1/mean", "kurtosis/r2/max"}
    for name, values in found.values.items():
        logged = [metrics[name] for _, metrics in recorder.logged if name in metrics]
        assert values == pytest.approx(logged, rel=1e-4)


def test_a_long_training_is_thinned_out_evenly(
    known: Any, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(known, make_trainer)
    monkeypatch.setattr(curves, "POINTS", 5)
    thin = train(known, make_trainer)
    assert thin.steps == [4, 8, 12]
    assert all(thin.values[name] == [values[step - 1] for step in thin.steps] for name, values in whole.values.items())


def test_a_resumed_training_has_the_whole_curves(known: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = train(known, make_trainer)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    train(known, make_trainer, callbacks=[saving])
    trainer = make_trainer()
    loader = BlockLoader(known.store, 20, STEPS, seed=1, first_row=0, last_row=100)
    (fifth,) = (tmp_path / "saved").glob("*step=5.ckpt")
    trainer.fit(KurTailModule(SIZES), loader, ckpt_path=fifth, weights_only=True)
    (resumed,) = (callback for callback in trainer.callbacks if isinstance(callback, Curves))  # type: ignore[attr-defined]
    assert (resumed.steps, resumed.values) == (whole.steps, whole.values)
