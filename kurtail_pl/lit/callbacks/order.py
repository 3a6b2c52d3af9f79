"""Callbacks run in the order of the recipe, and each needs what another wrote."""

from __future__ import annotations

import lightning as L

from kurtail_pl.errors import ConfigError


def require_before(trainer: L.Trainer, callback: L.Callback, *needed: type[L.Callback]) -> None:
    """Raise ConfigError unless callbacks of the needed kinds come earlier in the trainer's list."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(callback)]
    for kind in needed:
        if not any(isinstance(c, kind) for c in earlier):
            raise ConfigError(
                f"{type(callback).__name__} needs {kind.__name__} before it in trainer.callbacks; add it there"
            )
