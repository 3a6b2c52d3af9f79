"""Command lines over a recipe whose work is done later, or never."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch

from kurtail_pl.cli.trainer import KurtailCLI


class WaitingCLI(KurtailCLI):
    """Reads a recipe and makes everything of it, and begins the work of `fit` when it is told to."""

    def _run_subcommand(self, subcommand: str) -> None:
        self._begun_as = sys.argv[1:]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def begin(self, checkpoint: Path | None) -> None:
        """Do the work, as a command line of its own would have done it at once.

        Args:
            checkpoint: of a learning that is gone on with, whatever else stands there.
        """
        sys.argv = ["kurtail", *self._begun_as]  # Lightning starts the other processes of a run with it.
        self._set_seed()  # For those processes; and what was drawn from it until now is not drawn again.
        own, numpy, generator = self._random
        random.setstate(own)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
        if checkpoint is not None:
            self.config_init["fit"]["ckpt_path"] = str(checkpoint)
        super()._run_subcommand("fit")


class RecipeCLI(KurtailCLI):
    """Reads a recipe without making anything of it: sizes would come from the weights."""

    def instantiate_classes(self) -> None:
        """Leave it at the settings."""
