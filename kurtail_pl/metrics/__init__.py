"""torchmetrics classes over the functions of maths."""

from kurtail_pl.metrics.kurtosis import Kurtosis
from kurtail_pl.metrics.perplexity import Perplexity
from kurtail_pl.metrics.success_rate import SuccessRate

__all__ = ["Kurtosis", "Perplexity", "SuccessRate"]
