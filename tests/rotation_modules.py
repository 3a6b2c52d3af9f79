"""A small rotation module, the batches it learns from and what a training logs."""

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import scipy.stats
from torch import Tensor

from kurtail_pl.lit import KurTailModule
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.optim import CayleyAdam

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
