"""The only floor that knows Lightning: datamodules, a module for each method, loaders and callbacks."""

from kurtail_pl.lit.datamodule import ActivationDataModule, WindowDataModule
from kurtail_pl.lit.fixed import FixedRotations
from kurtail_pl.lit.kurtail import KurTailModule
from kurtail_pl.lit.spinquant import SpinQuantModule

__all__ = ["ActivationDataModule", "FixedRotations", "KurTailModule", "SpinQuantModule", "WindowDataModule"]
