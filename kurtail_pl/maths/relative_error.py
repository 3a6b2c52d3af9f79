"""How much of a weight, and of what it makes of its inputs, is lost when it is rounded."""

from __future__ import annotations

import math

from torch import Tensor

CHANNELS = 32
"""Output channels on which the error of the output is measured, evenly spaced: on all of them it would take a part of
the time of rounding."""
DIGITS = 5


def relative_errors(weight: Tensor, rounded: Tensor, hessian: Tensor | None) -> dict[str, float]:
    """Square errors over squares, with five digits.

    Args:
        weight: ``[out, in]``.
        rounded: what its codes stand for; it is overwritten.
        hessian: ``Y^T Y`` of what it multiplies, ``[in, in]``, if that is known.

    Returns:
        ``weight``: ``|W - Q|^2 / |W|^2``; with a Hessian ``output`` too, of every ``out / 32``-th output channel:
        ``tr (W - Q) H (W - Q)^T / tr W H W^T``. What is not a number is left out.
    """
    lost = rounded.sub_(weight)
    found = {"weight": _ratio(_squares(lost), _squares(weight))}
    if hessian is not None:
        every = math.ceil(len(weight) / CHANNELS)
        found["output"] = _ratio(*(_through(rows[::every], hessian) for rows in (lost, weight)))
    return {name: float(f"{value:.{DIGITS}g}") for name, value in found.items() if math.isfinite(value)}


def _squares(rows: Tensor) -> float:
    return float(rows.norm()) ** 2


def _through(rows: Tensor, hessian: Tensor) -> float:
    """``tr R H R^T``."""
    rows = rows.to(hessian.dtype)
    return float(((rows @ hessian) * rows).sum())


def _ratio(lost: float, whole: float) -> float:
    """Of nothing nothing is lost."""
    return lost / whole if whole > 0 else 0.0
