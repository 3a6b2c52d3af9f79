"""Progress of training as log lines, for where there is no terminal to draw a bar on."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.progress import plan_shown

log = logging.getLogger(__name__)

LEARN = "learn"
"""What this work is called in a plan of steps."""
LINES = 10


class StepLines(L.Callback):
    """Logs step, loss and kurtosis about ten times in a training; a plan that is shown gets every step instead."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first step begins."""
        if (plan := plan_shown()) is not None:
            plan.reached(LEARN, 0, 1)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log every tenth of the steps."""
        step, steps, plan = batch_idx + 1, int(trainer.num_training_batches), plan_shown()
        if plan is not None:
            plan.reached(LEARN, step, steps)
        elif step % max(1, steps // LINES) == 0 or step == steps:
            values = trainer.progress_bar_metrics
            shown = ", ".join(f"{name} {values[name]:.3f}" for name in ("loss", "k_r1", "k_r2") if name in values)
            log.info("%s: %d/%d, %s", LEARN, step, steps, shown)
