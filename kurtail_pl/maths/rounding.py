"""Nearest integers, half to even."""

from __future__ import annotations

import torch
from torch import Tensor

BORDER = 2.0**32
"""Steps of the grid that float64 numbers are put on before they are rounded to codes."""


def rounded(x: Tensor) -> Tensor:
    """Nearest integers, half to even, of numbers that nobody else needs: they may be overwritten.

    In float64 what is closer than 2^-33 to a half counts as one. Embeddings of float16, and what a first token sees of
    itself, hold exact halves, and where they are rounded to shall not depend on the order of a sum before.
    """
    return x.mul_(BORDER).round_().div_(BORDER).round_() if x.dtype == torch.float64 else x.round_()
