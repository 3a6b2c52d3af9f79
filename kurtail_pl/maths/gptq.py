"""GPTQ: rounding that lets the columns still to come make up for each rounding error (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer


@dataclass(frozen=True)
class GPTQ:
    """Settings of GPTQ; the defaults are those of QuaRot's and SpinQuant's papers, with activation order.

    Args:
        block_size: columns whose errors are propagated together.
        percdamp: the mean of the Hessian's diagonal times this is added to the diagonal.
        act_order: take the columns by falling diagonal of the Hessian. Groups stay those of the original order
            (static groups), so the codes need no permutation when stored.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    block_size: int = 128
    percdamp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}; give a positive number of columns")
        if self.percdamp <= 0:
            raise ConfigError(f"percdamp is {self.percdamp}; give a positive number, usually 0.01")


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, quantizer: Quantizer, settings: GPTQ) -> Quantized:
    """Quantize a weight against the inputs it will see.

    Args:
        weight: ``[out, in]``.
        hessian: ``X^T X`` of the layer's inputs, ``[in, in]``, up to a factor.
        grid: static grid ``[out, groups]``, from `search_grid`.
        quantizer: bits, symmetry and group size of the grid.
        settings: block size, damping, column order.

    Returns:
        Codes ``[out, in]`` on the given grid.

    Raises:
        torch.linalg.LinAlgError: when the damped Hessian is not positive definite.
    """
    n_in = weight.shape[1]
    weight, hessian = weight.float().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    # An input that is always zero asks nothing of its column; the mean of the others keeps the damping what it is.
    hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean() if dead.logical_not().any() else 1
    weight[:, dead] = 0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    if not settings.act_order:
        order = torch.arange(n_in, device=weight.device)
    group_of = torch.arange(n_in, device=weight.device) // (n_in // grid.scale.shape[1])
    scale = grid.scale.float()[:, group_of[order]].T.contiguous()
    zero = None if grid.zero_point is None else grid.zero_point.float()[:, group_of[order]].T.contiguous()

    factor = _inverse_factor(hessian[order][:, order], settings.percdamp).float()
    # Columns are taken one at a time: held as rows, each is contiguous.
    columns = weight[:, order].T.contiguous()
    codes = _solve(columns, factor, scale, zero, quantizer.code_range, settings.block_size)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return Quantized(unordered.T.contiguous().to(torch.int8 if quantizer.symmetric else torch.uint8), grid)


def _inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, ``[in, in]``, in float64."""
    hessian = hessian + percdamp * hessian.diagonal().mean() * torch.eye(
        len(hessian), dtype=hessian.dtype, device=hessian.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _solve(
    columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, code_range: tuple[int, int], block_size: int
) -> Tensor:
    """Codes of the columns ``[in, out]``, taken in order; ``columns`` is used up."""
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), block_size):
        block = slice(start, min(start + block_size, len(columns)))
        errors = torch.empty_like(columns[block])
        local = factor[block, block]
        for i in range(len(errors)):
            j = start + i
            column = columns[j]
            code = (column / scale[j]).round_()
            if zero is not None:
                code += zero[j]
            codes[j] = code.clamp_(*code_range)
            value = (code if zero is None else code - zero[j]) * scale[j]
            errors[i] = (column - value) / local[i, i]
            columns[j + 1 : block.stop].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return codes
