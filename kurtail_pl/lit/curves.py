"""The curves of a training, for the page that shows it."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor

SHOWN = ("loss/", "kurtosis/r")
"""Beginnings of the names, as the modules log them, of what is kept."""
POINTS = 500
"""About as many as a picture can show; of longer trainings every second step is kept, every fourth, and so on."""
DIGITS = 5


class Curves(L.Callback):
    """Keeps the loss, and the kurtosis of the batch, of every step.

    Attributes:
        steps: at which something was kept, from 1.
        values: by name, the number at each of these steps.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {}
        self._every = 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, for the checkpoint."""
        return {"steps": self.steps, "values": self.values, "every": self._every}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.steps, self.values, self._every = (state_dict[name] for name in ("steps", "values", "every"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step logged, and thin out what has become too long."""
        step = trainer.global_step
        # An accumulated gradient has several batches to a step: the first counts.
        if not step or step % self._every or step in self.steps[-1:]:
            return
        found = {
            name: float(f"{value.item():.{DIGITS}g}")
            for name, value in trainer.callback_metrics.items()
            if name.startswith(SHOWN) and isinstance(value, Tensor)
        }
        same = not self.values or found.keys() == self.values.keys()
        if not found or not same or not all(map(math.isfinite, found.values())):
            return
        self.steps.append(step)
        for name, value in found.items():
            self.values.setdefault(name, []).append(value)
        if len(self.steps) > POINTS:
            self._every *= 2
            kept = [place for place, step in enumerate(self.steps) if step % self._every == 0]
            self.steps = [self.steps[place] for place in kept]
            self.values = {name: [values[place] for place in kept] for name, values in self.values.items()}
