"""Measure the artefact and write its report."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks.quantization import WeightQuantization
from kurtail_pl.lit.callbacks.rotations import COST
from kurtail_pl.stages.report import report
from kurtail_pl.stages.results import evaluate_folder
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint


class Evaluation(L.Callback):
    """Writes `results.json`, `report.md` and the model card of the artefact.

    Args:
        text: evaluation text.

    Raises:
        TextError: before training, when the text is too short.
        ConfigError: when no `WeightQuantization` comes before.
    """

    def __init__(self, text: TextSpec) -> None:
        self.text = text

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check text and order before any long work."""
        if stage == "fit":
            quantization_of(trainer)
            cut_windows(trainer.datamodule.checkpoint.tokenizer(), self.text, "evaluation")  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the folder that the quantization wrote."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder = quantization_of(trainer).folder(data.capture_spec.model)
        cost = json.loads((Path(trainer.default_root_dir) / COST).read_text(encoding="utf-8"))
        evaluate_folder(Checkpoint(folder), folder, self.text, data.store, data.validation_rows, cost)
        report(folder)


def quantization_of(trainer: L.Trainer) -> WeightQuantization:
    """The trainer's quantization callback; raises ConfigError when the recipe has none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightQuantization):
            return callback
    raise ConfigError("the recipe evaluates but does not quantize; add WeightQuantization before Evaluation")
