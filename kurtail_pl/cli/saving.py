"""The recipe as it was run, in the run folder and in the artefact."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from kurtail_pl.lit.callbacks import WeightQuantization
from kurtail_pl.lit.callbacks.order import callback_of
from kurtail_pl.lit.rotations import RotationModule

RECIPE = "recipe.yaml"
"""Name of the recipe's file in an artefact."""


class KeepConfig(SaveConfigCallback):
    """Saves the recipe as run: `config.yaml` first, `config.resume-<n>.yaml` for each resume.

    Replacing `config.yaml` on a resume would leave `ckpt_path` in it, and running that file again would silently
    resume instead of repeating the run.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the name, then save."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        verb = self.config.get("subcommand")
        config = self.config.get(verb, self.config) if verb else self.config
        if config.get("ckpt_path"):
            self.config_filename = f"config.resume-{len(list(folder.glob('config.resume-*.yaml'))) + 1}.yaml"
        else:
            self.overwrite = True
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the recipe into the artefact; what is measured next is then known to be the recipe's."""
        quantization = callback_of(trainer, WeightQuantization)
        if trainer.is_global_zero and quantization is not None:
            assert isinstance(pl_module, RotationModule)
            folder = quantization.folder(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            recipe = self.config.clone()
            recipe["ckpt_path"] = None  # Whoever runs it again wants the whole run.
            self.parser.save(recipe, str(folder / RECIPE), skip_unset=False, overwrite=True, multifile=False)
