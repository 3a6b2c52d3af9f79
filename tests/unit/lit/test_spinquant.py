"""SpinQuant's module in a real trainer, on the tiny model, against transformers' own loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from kurtail_pl.errors import ConfigError, ResumeMismatch
from kurtail_pl.lit import FixedRotations, SpinQuantModule, WindowDataModule
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.loader import WindowLoader
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import LowRank, NUQCache, PerTokenHead
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.optim import CayleySGD
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.surgery.online import OnlineHadamard

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None."),
]
MakeTrainer = Callable[..., L.Trainer]
A4 = Scheme(weights=None)


class Record(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.errors: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["loss/total"].item())
        self.errors.append(trainer.callback_metrics["orthogonality/r1"].item())


SIZES = ModelSizes(layers=4, hidden_size=48, head_dim=16, kv_heads=2, rms_norm_eps=1e-6)


def module(scheme: Scheme = A4, lr: float = 0.2, steps: int = 8, seed: int = 0) -> SpinQuantModule:
    return SpinQuantModule(
        SIZES, Aim(scheme), rotation_seed=seed,
        optimizer=lambda parameters: CayleySGD(parameters, lr=lr, momentum=0.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
    )  # fmt: skip


@pytest.fixture
def windows(tiny: Path, text_file: Path, tmp_path: Path) -> Callable[..., WindowDataModule]:
    def make(steps: int = 8, count: int = 4, batch: int = 2) -> WindowDataModule:
        text = TextSpec(str(text_file), windows=count, seqlen=32)
        spec = CaptureSpec(str(tiny), text, rows=60)
        return WindowDataModule(spec, str(tmp_path / "store"), text, steps, batch, validation_rows=20)

    return make


def test_the_loss_without_quantizers_is_transformers_own(
    tiny: Path, windows: Callable[..., WindowDataModule], make_trainer: MakeTrainer
) -> None:
    data, record = windows(steps=2), Record()
    make_trainer(callbacks=[record]).fit(module(FLOAT), data)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for step, loss in enumerate(record.losses):
        ids = data.train_dataloader().batch(step)
        with torch.no_grad():
            assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_it_learns_without_the_rotations_that_the_runtime_has_not(
    windows: Callable[..., WindowDataModule], make_trainer: MakeTrainer
) -> None:
    """A quantizer rounds otherwise behind R4 and R5 than without them."""
    losses = []
    for online in (None, ["query_key", "attention_output", "mlp_hidden"], ["query_key"], []):
        record = Record()
        learner = SpinQuantModule(SIZES, Aim(A4, online), optimizer=lambda parameters: CayleySGD(parameters, lr=0.1))
        make_trainer(callbacks=[record]).fit(learner, windows(steps=1))
        turned = [name for name, each in learner.network.named_modules() if isinstance(each, OnlineHadamard)]
        kept = {"query_key": "query_key_rotation", "attention_output": "o_proj", "mlp_hidden": "down_proj"}
        for name, place in kept.items():
            assert any(place in path for path in turned) == (online is None or name in online)
        losses.append(record.losses[0])
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_the_loss_falls_on_a_window_seen_again_and_again(
    windows: Callable[..., WindowDataModule], make_trainer: MakeTrainer
) -> None:
    """Of eight bits that clip hard: what is clipped is learned away, and is far more than what rounding adds.

    A step of 2^-7 of the largest moves logits, and so the loss of 7, by about a hundredth; with four bits the loss
    goes up and down by 0.1 from step to step.
    """
    clipping = Scheme(None, Quantizer(8, clip=Clip(amount=0.6)), PerTokenHead(Quantizer(8, False), Quantizer(8, False)))
    record, learner = Record(), module(clipping, steps=40)
    make_trainer(callbacks=[record]).fit(learner, windows(steps=40, count=2))
    assert max(record.losses[-5:]) < record.losses[0] - 0.1
    assert max(record.errors) < 1e-5
    assert not learner.network.training


def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    windows: Callable[..., WindowDataModule], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = module()
    make_trainer().fit(whole, windows())
    saving = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    make_trainer(callbacks=[saving]).fit(module(), windows())
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name for name in state if "kurtosis" not in name} == {"residual", "value"}
    resumed = module()
    make_trainer().fit(resumed, windows(), ckpt_path=checkpoint, weights_only=True)
    assert torch.equal(resumed.residual, whole.residual)
    assert torch.equal(resumed.value, whole.value)
    for other in (module(lr=0.3), module(replace(A4, cache=None)), module(steps=9), module(seed=1)):
        with pytest.raises(ResumeMismatch):
            make_trainer().fit(other, windows(), ckpt_path=checkpoint, weights_only=True)
    with pytest.raises(ResumeMismatch, match="batch_windows"):
        make_trainer().fit(module(), windows(batch=4), ckpt_path=checkpoint, weights_only=True)


def test_windows_that_are_no_whole_batches_are_refused(windows: Callable[..., WindowDataModule]) -> None:
    with pytest.raises(ConfigError, match="batch_windows is 3 and the text has 4 windows"):
        windows(batch=3)


def test_each_window_comes_once_an_epoch_and_processes_share_a_batch() -> None:
    tokens = torch.arange(6 * 5).view(6, 5)
    epochs = [
        [int(w[0]) for batch in list(WindowLoader(tokens, 2, 6, seed=1))[e : e + 3] for w in batch] for e in (0, 3)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 5, 10, 15, 20, 25]
    whole, shares = WindowLoader(tokens, 2, 6, 1), [WindowLoader(tokens, 2, 6, 1, (rank, 2)) for rank in (0, 1)]
    for step in range(6):
        assert torch.equal(torch.cat([share.batch(step) for share in shares]), whole.batch(step))


def test_fixed_rotations_refuse_to_train(windows: Callable[..., WindowDataModule], make_trainer: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match="max_epochs is 1"):
        make_trainer().fit(FixedRotations(SIZES), windows())


def test_bits_by_layer_are_nothing_to_learn_through() -> None:
    with pytest.raises(ConfigError, match="quantized_weights is true and layer_bits are given"):
        SpinQuantModule(SIZES, Aim(Scheme(layer_bits=[4, 4, 4, 4])), quantized_weights=True)
    assert module(Scheme(layer_bits=[4, 4, 4, 4])).scheme == A4
    with pytest.raises(ConfigError, match="quantized_weights is true and side is given"):
        SpinQuantModule(SIZES, Aim(Scheme(side=LowRank(2))), quantized_weights=True)
    assert module(Scheme(side=LowRank(2))).scheme == A4


@pytest.mark.parametrize(
    "change",
    [
        {"centre": True},
        {"cache": PerTokenHead(centre_keys=True)},
        {"cache": NUQCache()},
        {"activation_scales": "static"},
        {"prefix": [1]},
    ],
    ids=str,
)
def test_a_scheme_that_a_text_decides_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"leave centre, cache, activation_scales and prefix"):
        module(replace(A4, **change))
