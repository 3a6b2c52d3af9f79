"""Progress of training as log lines, for where there is no terminal to draw a bar on."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

LINES = 10


class StepLines(L.Callback):
    """Logs step, loss and kurtosis about ten times in a training."""

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log every tenth of the steps."""
        step, steps = batch_idx + 1, int(trainer.num_training_batches)
        if step % max(1, steps // LINES) == 0 or step == steps:
            values = trainer.progress_bar_metrics
            shown = ", ".join(f"{name} {values[name]:.3f}" for name in ("loss", "k_r1", "k_r2") if name in values)
            log.info("learn: %d/%d, %s", step, steps, shown)
