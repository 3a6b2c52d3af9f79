"""Lightning's view of the activation store: capture when there is none, serve its rows."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L

from kurtail_pl.errors import ConfigError, ResumeMismatch
from kurtail_pl.lit.loader import BlockLoader
from kurtail_pl.stages.capture import CaptureSpec, capture, shape_of
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import differences
from kurtail_pl.storage.sources import open_model


class ActivationDataModule(L.LightningDataModule):
    """Serves cached layer activations; `prepare_data` captures them, or reuses a store of the same origin.

    Args:
        capture: model, calibration text, rows per site and seed.
        store: folder of the activation store.
        steps: training iterations; one epoch is exactly that long.
        batch_rows: rows of each site in a batch.
        validation_rows: the last rows of each site, kept out of training.

    Raises:
        ConfigError: when the training rows do not fill one batch.
    """

    def __init__(
        self,
        capture: CaptureSpec,
        store: str,
        steps: int = 100,
        batch_rows: int = 512,
        validation_rows: int = 1024,
    ) -> None:
        super().__init__()
        self.capture_spec, self.store_folder = capture, Path(store)
        self.steps, self.batch_rows, self.validation_rows = steps, batch_rows, validation_rows
        self.training_rows = capture.rows - validation_rows
        if steps < 1:
            raise ConfigError(f"data.steps is {steps}; training needs at least 1")
        if not 0 < batch_rows <= self.training_rows:
            raise ConfigError(
                f"data.batch_rows is {batch_rows} and {capture.rows} rows less {validation_rows} for validation leave "
                f"{self.training_rows} to train on; ask for smaller batches or more rows"
            )
        if validation_rows < 1:
            raise ConfigError(f"data.validation_rows is {validation_rows}; keep at least 1 row out of training")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The vanilla model."""
        return open_model(self.capture_spec.model)

    @property
    def layers(self) -> int:
        """Decoder layers; linked to the module."""
        return shape_of(self.checkpoint).layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream; linked to the module."""
        return shape_of(self.checkpoint).hidden_size

    @property
    def head_dim(self) -> int:
        """Width of a value head; linked to the module."""
        return shape_of(self.checkpoint).head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads; linked to the module."""
        return shape_of(self.checkpoint).kv_heads

    @property
    def rms_norm_eps(self) -> float:
        """The epsilon of the model's RMSNorm; linked to the module."""
        eps: float = self.checkpoint.config.rms_norm_eps
        return eps

    def prepare_data(self) -> None:
        """Capture, or check and reuse the store that stands there."""
        capture(self.capture_spec, self.store_folder)

    def setup(self, stage: str) -> None:
        """Open the store."""
        self.store = ActivationStore(self.store_folder)

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches, for the checkpoint; more `steps` only add batches at the end."""
        rows = {"batch_rows": self.batch_rows, "validation_rows": self.validation_rows}
        return {"activations": asdict(self.store.origin), **rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose batches were others.

        Raises:
            ResumeMismatch: naming the differences.
        """
        found = differences(state_dict, self.state_dict())
        if found:
            raise ResumeMismatch(
                f"the checkpoint was made from other data: {'; '.join(found)}; "
                "resume with its own, or start anew with --overwrite"
            )

    def train_dataloader(self) -> BlockLoader:
        """Blocks of the training rows, all of equal size."""
        last = self.training_rows - self.training_rows % self.batch_rows
        trainer = self.trainer
        share = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        if self.batch_rows % share[1]:
            raise ConfigError(
                f"data.batch_rows is {self.batch_rows} and {share[1]} processes share each batch; "
                "choose a multiple of their number"
            )
        return BlockLoader(self.store, self.batch_rows, self.steps, self.capture_spec.seed, 0, last, share)

    def val_dataloader(self) -> BlockLoader:
        """The validation rows, once."""
        batches = -(-self.validation_rows // self.batch_rows)
        return BlockLoader(self.store, self.batch_rows, batches, 0, self.training_rows, self.capture_spec.rows)
