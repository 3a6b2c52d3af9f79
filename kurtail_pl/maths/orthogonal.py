"""Steps and retractions on the Stiefel manifold of square orthogonal matrices (Li et al. 2020, arXiv 2002.01113)."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.maths.products import tf32_products

NEARLY = 0.5
"""Frobenius norm of ``X^T X - I`` from which Newton-Schulz passes surely converge: they would below 2."""
SQUARED_AWAY = 1e-8
"""The same norm, after which one more pass leaves nothing that float64 could tell."""


def skew_direction(x: Tensor, momentum: Tensor) -> Tensor:
    """Skew-symmetric ``W`` whose ``W X`` is the projection of the momentum on the tangent space at X.

    ``A = M X^T - 1/2 X (X^T M X^T)``, ``W = A - A^T`` (Li et al. 2020, Alg. 1). For a square X, where ``X X^T = I``,
    that is ``A = 1/2 M X^T``: one product in place of three.

    Args:
        x: orthogonal matrices ``[..., n, n]``.
        momentum: ``[..., n, n]``.

    Returns:
        ``[..., n, n]``, skew-symmetric.
    """
    outer = momentum @ x.mT
    return 0.5 * (outer - outer.mT)


def cayley_step(x: Tensor, w: Tensor, wx: Tensor, step: Tensor, iterations: int) -> Tensor:
    """Move X along the Cayley curve: solve ``Y = X - step/2 W (X + Y)`` by fixed-point iteration.

    The limit is ``(I + step/2 W)^-1 (I - step/2 W) X``, which is orthogonal. The iteration contracts where
    ``step/2 ||W|| < 1``: the optimizers cap the step so. The result is polished towards the nearest orthogonal matrix.

    Args:
        x: orthogonal matrices ``[..., n, n]``.
        w: skew-symmetric directions ``[..., n, n]``.
        wx: their product with X, which the optimizers have.
        step: step lengths ``[...]``.
        iterations: fixed-point passes after the first, explicit one.

    Returns:
        ``[..., n, n]``.
    """
    scale = 0.5 * step[..., None, None]
    half, half_x = scale * w, scale * wx
    y = x - 2 * half_x
    for _ in range(iterations):
        y = x - half_x - half @ y
    return polished(y)


def polished(x: Tensor) -> Tensor:
    """One Newton-Schulz pass towards the nearest orthogonal matrix, ``X + 1/2 X (I - X^T X)``: ``[..., n, n]``.

    What a Cayley step leaves undone would add up over the steps; the pass squares it away. The difference to the
    identity is taken in full precision, whatever the products around it are allowed.
    """
    with tf32_products(False):
        gram = x.mT @ x
    missing = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - gram
    return x + 0.5 * (x @ missing)


def capped_step(lr: float, w: Tensor, q: float, eps: float) -> Tensor:
    """Step length ``min(lr, 2q / (||W||_F + eps))`` for each matrix: ``[..., n, n]`` -> ``[...]``."""
    norm = torch.linalg.matrix_norm(w)
    return torch.clamp(2 * q / (norm + eps), max=lr)


def diagonal_blocks(x: Tensor, block: int) -> Tensor:
    """The blocks on the diagonal of matrices: ``[..., n, n]`` -> ``[..., n / block, block, block]``."""
    count = x.shape[-1] // block
    tiles = x.reshape(*x.shape[:-2], count, block, count, block)
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Matrices of the blocks on their diagonal, zero elsewhere: ``[..., c, k, k]`` -> ``[..., c k, c k]``."""
    eye = torch.eye(blocks.shape[-3], dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("...cij,cd->...cidj", blocks, eye).flatten(-4, -3).flatten(-2)


def orthogonality_error(x: Tensor) -> Tensor:
    """Largest entry of ``|X^T X - I|`` of each matrix: ``[..., n, n]`` -> ``[...]``, computed in float64."""
    x = x.double()
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return (x.mT @ x - eye).abs().amax((-2, -1))


def nearest_orthogonal(x: Tensor) -> Tensor:
    """Orthogonal matrices nearest in Frobenius norm (the polar factor), ``[..., n, n]``, in float64.

    Newton-Schulz passes arrive there, each with the square of the last one's error, from matrices that are nearly
    orthogonal, as learned ones are; a product costs a twentieth of a singular value decomposition, which does the rest.
    """
    x = x.double()
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    error = torch.linalg.matrix_norm(x.mT @ x - eye).max()
    if error > NEARLY:
        u, _, vh = torch.linalg.svd(x)
        nearest: Tensor = u @ vh
        return nearest
    while error > SQUARED_AWAY:
        x, error = polished(x), error**2
    return polished(x)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """Draw n independent signs, `[n]` float64."""
    return torch.randint(2, (n,), generator=generator).double() * 2 - 1
