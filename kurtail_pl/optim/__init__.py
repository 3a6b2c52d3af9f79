"""Optimizers on the Stiefel manifold."""

from kurtail_pl.optim.cayley import CayleyAdam, CayleySGD

__all__ = ["CayleyAdam", "CayleySGD"]
