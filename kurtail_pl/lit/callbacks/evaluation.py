"""Measure the artefact and write its report."""

from __future__ import annotations

import logging

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from kurtail_pl.lit.callbacks.order import CheckedCallback, callback_of, require_before
from kurtail_pl.lit.callbacks.quantization import WeightQuantization
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.evaluation.results import evaluate_folder
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec, chosen_tasks
from kurtail_pl.stages.reporting.report import report
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint

log = logging.getLogger(__name__)

LONG_WINDOWS = TextSpec(windows=6, seqlen=2048)


class Evaluation(CheckedCallback):
    """Writes `results.json`, `report.md`, `report.html` and the model card of the artefact.

    Args:
        text: evaluation text.
        tasks: of the lm-evaluation-harness, if any.

    Raises:
        TextError: before training, when the text is too short or a file of the tasks is missing.
        HarnessMissing: before training, when tasks are asked for and the harness is not installed.
        ConfigError: when no `WeightQuantization` comes before.
    """

    def __init__(self, text: TextSpec = LONG_WINDOWS, tasks: TaskSpec | None = None) -> None:
        self.text = text
        self.tasks = tasks

    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Refuse what would fail after hours of work."""
        require_before(trainer, self, WeightQuantization)
        cut_windows(data.checkpoint, self.text, "evaluation")
        if self.tasks is not None:
            chosen_tasks(self.tasks)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the folder that the quantization wrote."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, RotationModule)
        quantization = callback_of(trainer, WeightQuantization)
        assert quantization is not None
        folder = quantization.folder(pl_module, data)
        evaluate_folder(
            Checkpoint(folder), folder, self.text, data.store, data.validation_rows, self.tasks, data.compute
        )
        log.info("\n%s\n%s", report(folder), folder)
