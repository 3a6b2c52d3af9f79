"""A store whose rows are known, and a trainer that leaves no trace."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from kurtail_pl.storage.activations import (
    ActivationStore,
    Origin,
    Shape,
    SiteWriter,
    block_sites,
    value_sites,
    write_manifest,
)

SHAPE = Shape(layers=3, hidden_size=16, kv_heads=2, head_dim=4)
ROWS = 120


@dataclass(frozen=True)
class KnownStore:
    """A store and what is in it."""

    store: ActivationStore
    residual: Tensor
    """``[6, rows, 16]``: attention and MLP input of each layer."""
    value: Tensor
    """``[3, rows, 2, 4]``."""


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    """Rows with outlier channels, exact in bfloat16; the first entry of row r of every site is r / 32."""
    generator = torch.Generator().manual_seed(0)

    outliers = torch.tensor([0.0, 4, 4, 0])

    def draw(sites: int, width: int) -> Tensor:
        values = torch.randn(sites, ROWS, width, generator=generator) + outliers.repeat(width // 4)
        values = values.to(torch.bfloat16).float()
        values[..., 0] = torch.arange(ROWS) / 32
        return values

    residual, value = draw(6, 16), draw(3, 8)
    folder = tmp_path / "store"
    folder.mkdir()
    for sites, rows in ((block_sites(3), residual), (value_sites(3), value)):
        for site, site_rows in zip(sites, rows, strict=True):
            with SiteWriter(folder, site, *site_rows.shape) as writer:
                writer.write(torch.arange(ROWS), site_rows.to(torch.bfloat16))
    write_manifest(folder, Origin("none", "", "", "none", "", windows=1, seqlen=ROWS, rows=ROWS, seed=0), SHAPE, {})
    return KnownStore(ActivationStore(folder), residual, value.view(3, ROWS, 2, 4))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[Callable[..., L.Trainer]]:
    """Trainers of one epoch on the CPU, quiet, deterministic; the global switch is put back."""
    before = torch.are_deterministic_algorithms_enabled()

    def make(**settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        checkpointing = {
            "enable_checkpointing": any("ModelCheckpoint" in str(c) for c in settings.get("callbacks", []))
        }
        common = {"max_epochs": 1, "accelerator": "cpu", "deterministic": True, "default_root_dir": tmp_path}
        return L.Trainer(**{**quiet, **checkpointing, **common, **settings})

    yield make
    torch.use_deterministic_algorithms(before)
