"""Callbacks run in the order of the recipe, each needs what another wrote, and all say beforehand what would fail."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import lightning as L

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.rotations import RotationModule

C = TypeVar("C", bound=L.Callback)


def callback_of(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's first callback of a kind."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


class CheckedCallback(L.Callback):
    """Does its work at the end of fit, and refuses at the beginning what would fail then, after hours of work."""

    @abstractmethod
    def check(self, trainer: L.Trainer, module: RotationModule, data: StoredModel) -> None:
        """Raise what the work would."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, for those who run the callback under a trainer of their own."""
        if stage == "fit":
            assert isinstance(pl_module, RotationModule)
            self.check(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]


def require_before(trainer: L.Trainer, callback: L.Callback, *needed: type[L.Callback]) -> None:
    """Raise ConfigError unless callbacks of the needed kinds come earlier in the trainer's list."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(callback)]
    for kind in needed:
        if not any(isinstance(c, kind) for c in earlier):
            raise ConfigError(
                f"{type(callback).__name__} needs {kind.__name__} before it in trainer.callbacks; add it there"
            )
