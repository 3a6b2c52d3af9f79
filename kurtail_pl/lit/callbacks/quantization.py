"""Quantize the fused weights into an artefact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from kurtail_pl.lit.callbacks.fusion import FUSED, Fusion
from kurtail_pl.lit.callbacks.order import CheckedCallback, callback_of, require_before
from kurtail_pl.lit.callbacks.rotations import RotationWriter
from kurtail_pl.lit.curves import Curves
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import ONLINE
from kurtail_pl.stages.evaluation.results import RESULTS, artefact_name
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.spec import calibration_windows, require_fit, tuning_windows
from kurtail_pl.stages.reporting.page.model import CURVES, write_curves
from kurtail_pl.stages.reporting.report import REPORT
from kurtail_pl.storage.card import is_ours, read_card
from kurtail_pl.storage.files import refuse_existing
from kurtail_pl.storage.keys import folder_sha256, settings_key, unspelled
from kurtail_pl.storage.statement import MODEL_CARD

ARTEFACTS = Path("artifacts")


class WeightQuantization(CheckedCallback):
    """Writes the artefact folder, with the curves of the training that led to it.

    Args:
        out: the folder; null for `artifacts/<model>-<method>-<bits>`.
        settings: those of `QuantizeSpec`: bits, how weights are rounded, calibration.

    Raises:
        ArtefactError: before training, when the artefact exists and `--overwrite` was not given.
    """

    def __init__(self, out: str | None = None, **settings: Any) -> None:
        self.out = None if out is None else Path(out)
        self.spec = QuantizeSpec(**settings)
        self.overwrite = False
        self._text_sha256: str | None = None

    @property
    def scheme(self) -> Scheme:
        """What is quantized; linked to the module, which learns for it."""
        return self.spec.scheme

    def folder(self, module: RotationModule, data: StoredModel) -> Path:
        """Where the artefact of a module's method goes."""
        if self.out is not None:
            return self.out
        return ARTEFACTS / artefact_name(
            data.capture_spec.model, self.spec.method_name(module.method), self.spec.scheme_name
        )

    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Refuse a folder that must not be replaced, groups that fit no width, and a text too short."""
        require_before(trainer, self, RotationWriter, Fusion)
        fusion = callback_of(trainer, Fusion)
        if fusion is not None and module.rotates:
            online = ONLINE if fusion.online is None else fusion.online
            self.spec.runtime.require_online(online, module.inputs is not None)
        folder = self.folder(module, data)
        require_fit(data.checkpoint.config, self.spec, data.compute)
        text = calibration_windows(data.checkpoint, self.spec)
        self._text_sha256 = None if text is None else text.text_sha256
        if not self._awaits_evaluation(folder, data):
            refuse_existing(folder, self.overwrite)
        tuning_windows(data.checkpoint, self.spec)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantize what the fusion wrote; all processes share the calibration windows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, RotationModule)
        assert isinstance(data, StoredModel)
        folder, fused = self.folder(pl_module, data), Path(trainer.default_root_dir) / FUSED
        data.ranks.barrier()  # The first process fused alone.
        awaits = self._awaits_evaluation(folder, data)
        made = awaits and read_card(folder)["fused_sha256"] == folder_sha256(fused)
        data.ranks.barrier()  # All have looked before the first evaluates.
        if not made:
            quantize(fused, self.spec, folder, self.overwrite, data.compute, data.ranks)
        curves = callback_of(trainer, Curves)
        if data.ranks.leads and curves is not None and curves.steps and not (folder / CURVES).is_file():
            write_curves(folder, curves.steps, curves.values)

    def _awaits_evaluation(self, folder: Path, data: StoredModel) -> bool:
        """Whether an interrupted run of the same recipe left its artefact there, not or not wholly measured."""
        if not is_ours(folder) or all((folder / name).is_file() for name in (RESULTS, REPORT, MODEL_CARD)):
            return False
        card = read_card(folder)
        return bool(
            unspelled(card.get("quantize", {})) == settings_key(self.spec)
            and card.get("dtype") == data.compute.dtype
            and card.get("calibration_text_sha256") == self._text_sha256
        )
