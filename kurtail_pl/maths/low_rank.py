"""The best approximation of a weight by one of low rank, as its inputs see it."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""The mean of the Hessian's diagonal times this is added to the diagonal: inputs that the text never has count too."""


def low_rank(weight: Tensor, rank: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of the matrix of a rank that is nearest to a weight (Eckart and Young), in float64.

    Near is what the inputs see: the least ``tr(E H E^T)`` with E the difference and H the damped Hessian. That is the
    singular value decomposition of the weight times a factor of H, taken back by the factor's inverse. The left
    singular vectors need no factor: the best matrix is the weight projected on those of ``W H W^T``.

    Args:
        weight: ``[out, in]``.
        rank: at most the smaller of both.
        hessian: ``X^T X`` of the inputs, ``[in, in]``, up to a factor; None where all directions count alike.

    Returns:
        ``up [out, rank]`` and ``down [rank, in]``; in each component both have the same norm, so that neither takes
        more of float16's range than it must.

    Raises:
        torch.linalg.LinAlgError: when the damped Hessian is not positive definite.
    """
    exact = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        up = _largest(_times(exact, hessian) @ exact.T, rank)
        return _balanced(up, up.T @ exact)
    gram, factor = exact.T @ exact, None
    if (damping := _damping(hessian)) and hessian is not None:
        factor = hessian.double()
        factor = torch.linalg.cholesky(factor + damping * torch.eye(len(factor)).to(factor))
        gram = factor.T @ gram @ factor
    right = _largest(gram, rank)
    if factor is None:
        return _balanced(exact @ right, right.T)
    return _balanced(exact @ (factor @ right), torch.linalg.solve_triangular(factor, right.T, upper=False, left=False))


def output_square(error: Tensor, hessian: Tensor | None) -> float:
    """``tr(E H E^T)`` of an error ``[out, in]`` with the damped Hessian, which `low_rank` makes least."""
    exact = error.double()
    return float((_times(exact, hessian) * exact).sum())


def _times(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """A weight times the damped Hessian; its product is in the Hessian's own type, of which no copy is made."""
    damping = _damping(hessian)
    if not damping or hessian is None:
        return weight
    return (weight.to(hessian.dtype) @ hessian).double() + damping * weight


def _damping(hessian: Tensor | None) -> float:
    """What is added to the diagonal; 0 where there is no Hessian, or no token went into it."""
    return 0.0 if hessian is None else max(0.0, DAMPING * float(hessian.diagonal().double().mean()))


def _largest(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors ``[n, rank]`` of the largest eigenvalues of a symmetric matrix ``[n, n]``, the largest first."""
    vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors
    return vectors[:, -rank:].flip(1)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with equal norms of each column of `up` and its row of `down`."""
    ratio = down.norm(dim=1) / up.norm(dim=0)
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio)).sqrt()
    return up * scale, down / scale.unsqueeze(1)
