"""An interrupted training that goes on from its checkpoint ends where an undisturbed one ends, bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from kurtail_pl.lit import KurTailModule
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.optim import CayleyAdam

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]
STEPS = 12
MakeTrainer = Callable[..., L.Trainer]


@pytest.fixture(autouse=True)
def _keep_ctrl_c() -> Iterator[None]:
    """Lightning ignores SIGINT from the first KeyboardInterrupt on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Interrupt(L.Callback):
    """Presses Ctrl-C at a hook of one step."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step
        setattr(self, hook, self._press)

    def _press(self, trainer: L.Trainer, *_: Any) -> None:
        # After the optimizer's step `global_step` has already moved on.
        if trainer.global_step == self.step + (self.hook == "on_train_batch_end"):
            os.kill(os.getpid(), signal.SIGINT)


class InterruptedAdam(CayleyAdam):
    """Ctrl-C between the update of R1 and that of the R2s, in the eighth step."""

    def _update(self, x: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        moved = super()._update(x, grad, state, group)
        if x.ndim == 2 and state["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return moved


InterruptedAdam.__name__ = CayleyAdam.__name__  # A checkpoint of another optimizer would be refused.


SIZES = ModelSizes(layers=3, hidden_size=16, head_dim=4, kv_heads=2, rms_norm_eps=1e-2)


def module(optimizer: type[CayleyAdam] = CayleyAdam) -> KurTailModule:
    return KurTailModule(SIZES, optimizer=lambda parameters: optimizer(parameters, lr=0.3))


def loader(known: Any) -> BlockLoader:
    """Five blocks to an epoch, so that twelve steps take more than two."""
    return BlockLoader(known.store, 20, STEPS, seed=1, first_row=0, last_row=100)


def saving(folder: Path, every: int = 5) -> ModelCheckpoint:
    """As in the recipes."""
    return ModelCheckpoint(
        folder, every_n_train_steps=every, save_last=True, save_on_exception=True, enable_version_counter=False
    )


def straight(known: Any, make_trainer: MakeTrainer) -> tuple[Tensor, Tensor]:
    undisturbed = module()
    make_trainer().fit(undisturbed, loader(known))
    return undisturbed.residual.detach(), undisturbed.value.detach()


def resume(known: Any, make_trainer: MakeTrainer, checkpoint: Path) -> tuple[L.Trainer, KurTailModule]:
    resumed, trainer = module(), make_trainer()
    trainer.fit(resumed, loader(known), ckpt_path=checkpoint, weights_only=True)
    return trainer, resumed


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 6),
        ("on_train_batch_end", 10),
        ("on_train_batch_start", 7),
        ("on_before_backward", 7),
        ("on_before_optimizer_step", 7),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(
    known: Any, make_trainer: MakeTrainer, tmp_path: Path, hook: str, step: int
) -> None:
    residual, value = straight(known, make_trainer)
    stopped = module()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        make_trainer(callbacks=[Interrupt(hook, step), saving(tmp_path)]).fit(stopped, loader(known))
    assert not torch.equal(stopped.residual, residual)
    trainer, resumed = resume(known, make_trainer, tmp_path / "last.ckpt")
    assert trainer.global_step == STEPS
    assert torch.equal(resumed.residual, residual)
    assert torch.equal(resumed.value, value)


def test_interrupted_between_two_rotations_and_resumed(known: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    residual, value = straight(known, make_trainer)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        make_trainer(callbacks=[saving(tmp_path)]).fit(module(InterruptedAdam), loader(known))
    trainer, resumed = resume(known, make_trainer, tmp_path / "last.ckpt")
    assert trainer.global_step == STEPS
    assert torch.equal(resumed.residual, residual)
    assert torch.equal(resumed.value, value)


def test_every_periodic_checkpoint_leads_to_the_same_end(known: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    residual, value = straight(known, make_trainer)
    keep_all = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    make_trainer(callbacks=[keep_all]).fit(module(), loader(known))
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == STEPS // 3
    for checkpoint in checkpoints:
        _, resumed = resume(known, make_trainer, checkpoint)
        assert torch.equal(resumed.residual, residual)
        assert torch.equal(resumed.value, value)


def test_going_on_with_the_weights_alone_ends_elsewhere(known: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    # The comparison above would notice lost moments or a loader that starts over.
    residual, _ = straight(known, make_trainer)
    trainer = make_trainer(callbacks=[Interrupt("on_train_batch_end", 6), saving(tmp_path)])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(module(), loader(known))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (moments,) = [state["state"] for state in saved["optimizer_states"]]
    assert {entry["step"] for entry in moments.values()} == {7}
    continued = module()
    continued.load_state_dict(saved["state_dict"], strict=False)
    make_trainer(max_steps=5).fit(continued, loader(known))
    assert not torch.equal(continued.residual, residual)


def stopping(folder: Path) -> list[L.Callback]:
    """Stop at the second look, which like the first falls after a checkpoint's turn; as in a recipe."""
    stop = EarlyStopping("error/validation", min_delta=1.0, patience=1)
    save = ModelCheckpoint(folder, save_last=True, save_on_exception=True, enable_version_counter=False)
    return [stop, save]


def test_what_was_stopped_early_is_not_taken_further(known: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    rows = BlockLoader(known.store, 20, 1, seed=0, first_row=100, last_row=120)
    stopped, trainer = module(), make_trainer(callbacks=stopping(tmp_path), val_check_interval=3)
    trainer.fit(stopped, loader(known), rows)
    assert trainer.global_step == 6
    again, resumed = make_trainer(callbacks=stopping(tmp_path), val_check_interval=3), module()
    again.fit(resumed, loader(known), rows, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step == 6
    assert torch.equal(resumed.residual, stopped.residual)


@pytest.mark.parametrize(("hook", "step"), [("on_train_batch_end", 2), ("on_train_batch_end", 4)])
def test_a_resumed_run_stops_where_an_undisturbed_one_does(
    known: Any, make_trainer: MakeTrainer, tmp_path: Path, hook: str, step: int
) -> None:
    rows = BlockLoader(known.store, 20, 1, seed=0, first_row=100, last_row=120)
    undisturbed = module()
    make_trainer(callbacks=stopping(tmp_path / "a"), val_check_interval=3).fit(undisturbed, loader(known), rows)
    callbacks = [Interrupt(hook, step), *stopping(tmp_path / "b")]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        make_trainer(callbacks=callbacks, val_check_interval=3).fit(module(), loader(known), rows)
    trainer, resumed = make_trainer(callbacks=stopping(tmp_path / "b"), val_check_interval=3), module()
    trainer.fit(resumed, loader(known), rows, ckpt_path=tmp_path / "b" / "last.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert torch.equal(resumed.residual, undisturbed.residual)
