"""Refinement of integer weights: coordinate descent on the codes, and scales by least squares, turn by turn.

GPTQ takes each column once, when those before it are settled. Going round again, each code takes the value that is best
given all others (QuantEase, arXiv 2309.01885), and each scale that which is best given the codes: the output error only
falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantized, dequantize


class OutputError:
    """``||(W - V) X||^2 + damping ||W - V||^2`` of values V that stand for a weight W.

    Args:
        weight: ``[out, in]``.
        hessian: ``X X^T``, ``[in, in]``, up to a factor.
        damping: added to the Hessian's diagonal.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, damping: float) -> None:
        self.weight, self.hessian, self.damping = weight.float(), hessian.float(), damping

    def of_rows(self, quantized: Quantized) -> Tensor:
        """The error of each output channel, ``[out]``."""
        lost = self.weight - dequantize(quantized)
        return ((lost @ self.hessian + self.damping * lost) * lost).sum(1)


def refine(
    error: OutputError,
    quantized: Quantized,
    code_range: tuple[int, int],
    rounds: int,
    block_size: int,
    fits_scales: bool = True,
) -> Quantized:
    """Lower the output error of codes on a grid.

    Args:
        error: of what the codes stand for.
        quantized: codes ``[out, in]`` on a grid ``[out, groups]``.
        code_range: smallest and largest code.
        rounds: how often all codes, and then all scales, are gone through.
        block_size: columns whose changes are passed on together; it changes nothing but the speed.
        fits_scales: whether scales change too.

    Returns:
        Codes, and the grid with its new scales.
    """
    # Columns are taken one at a time: held as rows, each is contiguous.
    grid = quantized.grid
    size = error.weight.shape[1] // grid.scale.shape[1]
    zeros = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    zeros, scales = zeros.float().T.contiguous(), grid.scale.float().T.clone()
    steps = quantized.codes.T.float() - zeros.repeat_interleave(size, 0)
    lost = error.weight.T - steps * scales.repeat_interleave(size, 0)
    gradient = torch.addmm(lost, error.hessian, lost, beta=error.damping)
    del lost
    for _ in range(rounds):
        _descend(error, gradient, steps, scales, zeros, code_range, block_size)
        if fits_scales:
            _fit_scales(error, gradient, steps, scales)
    codes = steps.add_(zeros.repeat_interleave(size, 0)).T.contiguous().to(quantized.codes.dtype)
    return Quantized(codes, Grid(scales.T.contiguous().to(grid.scale.dtype), grid.zero_point))


def _descend(
    error: OutputError,
    gradient: Tensor,
    steps: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code_range: tuple[int, int],
    block_size: int,
) -> None:
    """Give each code in turn its best value, in place.

    Args:
        error: that falls.
        gradient: ``(H + damping) (W - V)``, ``[in, out]``; half the descent direction.
        steps: codes less their zero point, ``[in, out]``.
        scales: ``[groups, out]``.
        zeros: zero points, ``[groups, out]``.
        code_range: smallest and largest code.
        block_size: see `refine`.
    """
    low, high = code_range
    diagonal = error.hessian.diagonal() + error.damping
    size = len(steps) // len(scales)
    for start in range(0, len(steps), block_size):
        block = slice(start, start + block_size)
        local, hessian = gradient[block].clone(), error.hessian[block, block].clone()
        hessian.diagonal().add_(error.damping)
        moved = torch.empty_like(local)
        for i in range(len(local)):
            j = start + i
            scale, zero = scales[j // size], zeros[j // size]
            best = (steps[j] + local[i] / (diagonal[j] * scale)).round_().add_(zero).clamp_(low, high).sub_(zero)
            moved[i] = (best - steps[j]) * scale
            steps[j] = best
            local.addr_(hessian[i], moved[i], alpha=-1)
        gradient.addmm_(error.hessian[:, block], moved, alpha=-1)
        gradient[block].sub_(moved, alpha=error.damping)


def _fit_scales(error: OutputError, gradient: Tensor, steps: Tensor, scales: Tensor) -> None:
    """Give each group's scale in turn its best value, in place; arguments as of `_descend`."""
    size = len(steps) // len(scales)
    for group in range(len(scales)):
        mine = slice(group * size, (group + 1) * size)
        codes = steps[mine]
        curvature = ((error.hessian[mine, mine] @ codes + error.damping * codes) * codes).sum(0)
        change = torch.where(curvature > 0, (codes * gradient[mine]).sum(0) / curvature, 0)
        # A scale is above 0; one that would not be stays.
        change = torch.where(scales[group] + change > 0, change, 0)
        scales[group] += change
        gradient.addmm_(error.hessian[:, mine], codes * change, alpha=-1)
        gradient[mine].sub_(codes * change, alpha=error.damping)
