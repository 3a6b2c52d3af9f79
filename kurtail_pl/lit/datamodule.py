"""Lightning's view of the activation store: captured when there is none; its rows, or windows of text, as batches."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L

from kurtail_pl.errors import ConfigError, ResumeMismatch, listed
from kurtail_pl.lit.loader import BlockLoader, WindowLoader
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.capture.stage import CaptureSpec, capture, origin_of, shape_of
from kurtail_pl.stages.evaluation.results import model_name
from kurtail_pl.stages.planning.learning import Learning, ProxyLearning, WholeModelLearning
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.storage.activations import Origin
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import settings_key
from kurtail_pl.storage.resume import differences
from kurtail_pl.storage.sources import open_model
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.positions import require_positions

RUNS = Path("runs")
VALIDATION_BATCH = 512
"""Rows of each site that are measured at a time."""
SMOLLM2 = CaptureSpec()
WINDOWS = TextSpec(windows=800, seqlen=1024)
"""One hundred steps of eight."""


def runs_of(model: str) -> Path:
    """Where the runs of a model go, and its activations, when nobody says otherwise."""
    return RUNS / model_name(model)


class StoredModel(L.LightningDataModule):
    """A model's sizes and its activation store, whose last rows every method is measured on.

    Args:
        capture: model, calibration text, rows per site and seed.
        store: folder of the activation store, null for one in `runs`; `setup` captures it, or reuses one of the same
            origin. All processes of a trainer share that work, and must see the folder.
        steps: training iterations; one epoch is exactly that long.
        validation_rows: the last rows of each site, kept out of training.
        compute: device and floating-point type in which capture, fusion, GPTQ and evaluation run the model; the
            trainer has its own.

    Raises:
        ConfigError: when a setting is out of range.
    """

    def __init__(
        self, capture: CaptureSpec, store: str | None, steps: int, validation_rows: int, compute: Compute = AUTO
    ) -> None:
        super().__init__()
        self.capture_spec, self.compute = capture, compute
        self.store_folder = Path(store or runs_of(capture.model) / "store")
        self.steps, self.validation_rows = steps, validation_rows
        self.ranks = ALONE
        if steps < 1:
            raise ConfigError(f"data.steps is {steps}; training needs at least 1")
        if validation_rows < 1:
            raise ConfigError(f"data.validation_rows is {validation_rows}; keep at least 1 row out of training")
        if capture.known_rows is not None:
            self.require_rows(capture.known_rows)

    def require_rows(self, rows: int) -> None:
        """Raise ConfigError unless so many rows of each site are enough."""
        if self.validation_rows >= rows:
            raise ConfigError(
                f"data.validation_rows is {self.validation_rows} of {rows} rows; leave some to train on, or ask for "
                "more rows"
            )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The vanilla model."""
        return open_model(self.capture_spec.model)

    @property
    def sizes(self) -> ModelSizes:
        """Of the model; linked to the module."""
        config = self.checkpoint.config
        shape, rigid = shape_of(config), architecture_of(config).rigid_residual
        sizes = ModelSizes(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            head_dim=shape.head_dim,
            kv_heads=shape.kv_heads,
            rms_norm_eps=config.rms_norm_eps,
        )
        return sizes if rigid is None else {**sizes, "rigid_residual": rigid}

    def setup(self, stage: str) -> None:
        """Capture, or check and reuse the store that stands there.

        Not in `prepare_data`, which Lightning calls on one process while the others wait.
        """
        self.ranks = Ranks.joined()
        store = capture(self.capture_spec, self.store_folder, compute=self.compute, ranks=self.ranks)
        assert store is not None
        self.store = store
        self.require_rows(store.origin.rows)

    @cached_property
    def origin(self) -> Origin:
        """What the store is made from, or will be; before `setup` the text is tokenised for it, once."""
        if hasattr(self, "store"):
            return self.store.origin
        spec = self.capture_spec
        windows = cut_windows(self.checkpoint, spec.text, "calibration", seed=spec.seed)
        return origin_of(spec, self.checkpoint, windows, self.compute)

    @property
    def training_rows(self) -> int:
        """Rows of each site to train on: all but the last ones."""
        return self.store.origin.rows - self.validation_rows

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the batches; plain data for JSON. More `steps` only add batches at the end."""

    @abstractmethod
    def learning(self) -> Learning:
        """What the training takes, for the plan."""

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches, for the checkpoint."""
        return self.settings()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose batches were others.

        Raises:
            ResumeMismatch: naming the differences.
        """
        found = differences(state_dict, self.state_dict())
        if found:
            raise ResumeMismatch(
                f"the checkpoint was made from other data: {listed(found)}; "
                "resume with its own, or start anew with --overwrite"
            )

    def share_of(self, name: str, amount: int) -> tuple[int, int]:
        """Rank and number of the processes that share each batch; raises ConfigError when it does not divide."""
        trainer = self.trainer
        share = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        if amount % share[1]:
            raise ConfigError(
                f"data.{name} is {amount} and {share[1]} processes share each batch; choose a multiple of their number"
            )
        return share

    def val_dataloader(self) -> BlockLoader:
        """The validation rows, once."""
        rows = min(VALIDATION_BATCH, self.validation_rows)
        batches = -(-self.validation_rows // rows)
        return BlockLoader(self.store, rows, batches, 0, self.training_rows, self.store.origin.rows)


class ActivationDataModule(StoredModel):
    """Serves cached layer activations.

    Args:
        capture: see `StoredModel`.
        store: see `StoredModel`.
        steps: see `StoredModel`.
        batch_rows: rows of each site in a batch.
        validation_rows: see `StoredModel`.
        compute: see `StoredModel`.

    Raises:
        ConfigError: when the training rows do not fill one batch.
    """

    def __init__(
        self,
        capture: CaptureSpec = SMOLLM2,
        store: str | None = None,
        steps: int = 100,
        batch_rows: int = 512,
        validation_rows: int = 1024,
        compute: Compute = AUTO,
    ) -> None:
        self.batch_rows = batch_rows  # Before the others: they look at the rows.
        super().__init__(capture, store, steps, validation_rows, compute)

    def require_rows(self, rows: int) -> None:
        """Raise ConfigError unless so many rows of each site fill a batch."""
        super().require_rows(rows)
        left = rows - self.validation_rows
        if not 0 < self.batch_rows <= left:
            raise ConfigError(
                f"data.batch_rows is {self.batch_rows} and {rows} rows less {self.validation_rows} for validation "
                f"leave {left} to train on; ask for smaller batches or more rows"
            )

    def settings(self) -> dict[str, Any]:
        """Store and batch."""
        rows = {"batch_rows": self.batch_rows, "validation_rows": self.validation_rows}
        return {"activations": self.origin.key, **rows}

    def learning(self) -> Learning:
        """Rows of every site."""
        return ProxyLearning(self.steps, self.batch_rows)

    def train_dataloader(self) -> BlockLoader:
        """Blocks of the training rows, all of equal size."""
        last = self.training_rows - self.training_rows % self.batch_rows
        share = self.share_of("batch_rows", self.batch_rows)
        return BlockLoader(self.store, self.batch_rows, self.steps, self.capture_spec.seed, 0, last, share)


class WindowDataModule(StoredModel):
    """Serves windows of text, for methods that learn through the whole model.

    Args:
        capture: see `StoredModel`; the activations are only measured on.
        store: see `StoredModel`.
        text: calibration text; its windows are drawn by the capture's seed.
        steps: see `StoredModel`.
        batch_windows: windows in a batch.
        validation_rows: see `StoredModel`.
        compute: see `StoredModel`.

    Raises:
        ConfigError: when the windows are no whole number of batches.
    """

    def __init__(
        self,
        capture: CaptureSpec = SMOLLM2,
        store: str | None = None,
        text: TextSpec = WINDOWS,
        steps: int = 100,
        batch_windows: int = 8,
        validation_rows: int = 1024,
        compute: Compute = AUTO,
    ) -> None:
        super().__init__(capture, store, steps, validation_rows, compute)
        self.text, self.batch_windows = text, batch_windows
        if batch_windows < 1 or text.windows is None or text.windows % batch_windows:
            raise ConfigError(
                f"data.batch_windows is {batch_windows} and the text has {text.windows or 'any'} windows; "
                "choose a divisor"
            )

    def setup(self, stage: str) -> None:
        """Capture as all do, but refuse windows that are too long for the model first."""
        require_positions(self.text.seqlen, self.checkpoint.positions)
        super().setup(stage)

    @cached_property
    def windows(self) -> Windows:
        """The windows of tokens."""
        return cut_windows(self.checkpoint, self.text, "calibration", seed=self.capture_spec.seed)

    def settings(self) -> dict[str, Any]:
        """Model, text and batch."""
        return {
            "model_sha256": self.checkpoint.sha256,
            "text_sha256": self.windows.text_sha256,
            **settings_key(self.text),
            "data_seed": self.capture_spec.seed,
            "batch_windows": self.batch_windows,
        }

    def learning(self) -> Learning:
        """Windows through the whole model."""
        return WholeModelLearning(self.steps, self.batch_windows, self.text.seqlen)

    def train_dataloader(self) -> WindowLoader:
        """Batches of windows."""
        share = self.share_of("batch_windows", self.batch_windows)
        return WindowLoader(self.windows.tokens, self.batch_windows, self.steps, self.capture_spec.seed, share)
