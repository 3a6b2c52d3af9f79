"""What happens after the last step, in this order: write rotations, fuse, quantize, draw, evaluate.

Each callback calls one stage. They find each other's output under the trainer's `default_root_dir`, so that every
stage can also be run again alone by its verb.
"""

from kurtail_pl.lit.callbacks.checkpoints import Checkpoints
from kurtail_pl.lit.callbacks.evaluation import Evaluation
from kurtail_pl.lit.callbacks.figures import Figures
from kurtail_pl.lit.callbacks.fusion import Fusion
from kurtail_pl.lit.callbacks.lines import StepLines
from kurtail_pl.lit.callbacks.quantization import WeightQuantization
from kurtail_pl.lit.callbacks.rotations import RotationWriter

__all__ = ["Checkpoints", "Evaluation", "Figures", "Fusion", "RotationWriter", "StepLines", "WeightQuantization"]
