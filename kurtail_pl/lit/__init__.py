"""The only floor that knows Lightning: datamodule, module, loader and callbacks."""

from kurtail_pl.lit.datamodule import ActivationDataModule
from kurtail_pl.lit.module import KurTailModule

__all__ = ["ActivationDataModule", "KurTailModule"]
