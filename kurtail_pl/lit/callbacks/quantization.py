"""Quantize the fused weights into an artefact folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from kurtail_pl.lit.callbacks.fusion import FUSED, Fusion
from kurtail_pl.lit.callbacks.order import require_before
from kurtail_pl.lit.callbacks.rotations import RotationWriter
from kurtail_pl.lit.datamodule import ActivationDataModule
from kurtail_pl.stages.quantize import QuantizeSpec, calibration_windows, quantize
from kurtail_pl.stages.results import artefact_name
from kurtail_pl.storage.files import refuse_existing


class WeightQuantization(L.Callback):
    """Writes the artefact folder `<artefacts>/<model>-kurtail-<bits>`.

    Args:
        quantize: bits, RTN or GPTQ, calibration.
        artefacts: folder of all artefacts.

    Raises:
        ArtefactError: before training, when the artefact exists and `--overwrite` was not given.
    """

    def __init__(self, quantize: QuantizeSpec, artefacts: str = "artifacts") -> None:
        self.quantize_spec, self.artefacts = quantize, Path(artefacts)
        self.overwrite = False

    def folder(self, model: str, method: str = "kurtail") -> Path:
        """Where a method's artefact goes."""
        return self.artefacts / artefact_name(model, method, self.quantize_spec.scheme)

    def check(self, trainer: L.Trainer, data: ActivationDataModule) -> None:
        """Refuse a folder that must not be replaced, and a calibration text that is too short."""
        require_before(trainer, self, RotationWriter, Fusion)
        refuse_existing(self.folder(data.capture_spec.model), self.overwrite)
        calibration_windows(data.checkpoint, self.quantize_spec)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, for those who run the callback under a trainer of their own."""
        if stage == "fit":
            self.check(trainer, trainer.datamodule)  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantize what the fusion wrote."""
        model = trainer.datamodule.capture_spec.model  # type: ignore[attr-defined]
        fused = Path(trainer.default_root_dir) / FUSED
        quantize(fused, self.quantize_spec, self.folder(model), overwrite=self.overwrite)
