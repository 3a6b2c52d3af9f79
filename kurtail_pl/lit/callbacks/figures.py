"""Draw the paper's figures when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks.order import CheckedCallback, callback_of, require_before
from kurtail_pl.lit.callbacks.quantization import WeightQuantization
from kurtail_pl.lit.callbacks.rotations import RotationWriter
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.stages.reporting.figures import Pages, chosen_layers, figures, file_of
from kurtail_pl.storage.rotation_file import FILE, read_rotations
from kurtail_pl.surgery.rotations import random_rotations

FOLDER = "figures"


class Figures(CheckedCallback):
    """Writes the folder `figures` of the artefact, or of the trainer's root without one, and TensorBoard's pages.

    Args:
        layers: whose sensitivity, surface and histogram are drawn; by default the paper's 1 and 15, or the last one.

    Raises:
        ConfigError: before training, when no `RotationWriter` comes before, a `WeightQuantization` comes after, or a
            layer is asked for that the model has not.
    """

    def __init__(self, layers: list[int] | None = None) -> None:
        self.layers = layers

    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Refuse what would fail after training."""
        if not module.rotates:
            raise ConfigError("Figures shows what rotations do, and this recipe has none; remove it")
        quantized = callback_of(trainer, WeightQuantization) is not None
        require_before(trainer, self, RotationWriter, *([WeightQuantization] if quantized else []))
        chosen_layers(data.sizes["layers"], self.layers)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw from the validation rows, with random Hadamards of the same seed as the baseline."""
        root, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, RotationModule)
        rotations, config = read_rotations(root / FILE), data.checkpoint.config
        quantization = callback_of(trainer, WeightQuantization)
        folder = (quantization.folder(pl_module, data) if quantization else root) / FOLDER
        pages = figures(
            data.store,
            rotations,
            random_rotations(config, rotations.origin.get("seed", 0)),
            config.rms_norm_eps,
            folder,
            data.validation_rows,
            self.layers,
            overwrite=True,
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _log(logger, pages, folder, trainer.global_step)


def _log(logger: TensorBoardLogger, pages: Pages, folder: Path, step: int) -> None:
    """Add every page under its tag, once a run; figures as they were written, for to draw them again takes as long."""
    board = logger.experiment
    for tag in pages.figures:
        board.add_image(tag, imread(folder / file_of(tag))[..., :3], step, dataformats="HWC")
    for tag, values in pages.histograms.items():
        board.add_histogram(tag, values, step)
    for tag, table in pages.tables.items():
        board.add_text(tag, table, step)
