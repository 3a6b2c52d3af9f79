"""torchmetrics classes over the functions of maths."""

from kurtail_pl.metrics.kurtosis import Kurtosis
from kurtail_pl.metrics.perplexity import Perplexity

__all__ = ["Kurtosis", "Perplexity"]
