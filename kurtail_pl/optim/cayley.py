"""Cayley Adam and Cayley SGD: optimizers for orthogonal matrices (Li et al. 2020, arXiv 2002.01113, Alg. 1 and 2).

Parameters are square orthogonal matrices ``[..., n, n]``. Second moments, bias corrections and step caps are kept for
each matrix, so that a stack of matrices learns exactly as the matrices would one by one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.orthogonal import capped_step, cayley_step, skew_direction
from kurtail_pl.maths.products import tf32_products


def _check(lr: float, decays: tuple[float, ...], eps: float, q: float, iterations: int) -> None:
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr is {lr}; give a positive step size")
    for decay in decays:
        if not 0 <= decay < 1:
            raise ConfigError(f"a decay of the moments is {decay}; it must lie in [0, 1)")
    if not 0 <= eps < math.inf:
        raise ConfigError(f"eps is {eps}; it cannot be negative")
    if not 0 < q <= 1:
        raise ConfigError(f"q is {q}; the fixed-point iteration converges for q in (0, 1]")
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}; the Cayley transform needs at least 1 fixed-point pass")


class _Cayley(Optimizer):
    """What both share: the loop over parameters with a gradient."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the manifold.

        Raises:
            ValueError: when a parameter is not a stack of square matrices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
                    raise ValueError(f"parameter of shape {tuple(x.shape)} is no stack of square matrices [..., n, n]")
                # TF32 turns the direction by a thousandth at most; the last pass restores orthogonality in float32.
                with tf32_products(x.is_cuda):
                    x.copy_(self._update(x, x.grad, self.state[x], group))
        return loss

    @abstractmethod
    def _update(self, x: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The next X of one parameter; the state is updated in place."""


class CayleyAdam(_Cayley):
    """Adam on the Stiefel manifold through the Cayley transform (Li et al. 2020, Alg. 2).

    Args:
        params: orthogonal matrices ``[..., n, n]``.
        lr: step size; a step turns a matrix by at most ``2q`` radians in Frobenius norm, whatever lr says.
        betas: decay of the momentum and of the second moment (one scalar for each matrix).
        eps: added to norms before dividing.
        q: cap of the step, ``min(lr, 2q / (||W|| + eps))``.
        iterations: fixed-point passes of the Cayley transform.

    Raises:
        ConfigError: when a setting is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        q: float = 0.15,
        iterations: int = 5,
    ) -> None:
        _check(lr, betas, eps, q, iterations)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "q": q, "iterations": iterations})

    def _update(self, x: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(x)
            state["second_moment"] = x.new_zeros(x.shape[:-2])
        beta1, beta2 = group["betas"]
        state["step"] += 1
        correct1, correct2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        momentum = state["momentum"].lerp_(grad, 1 - beta1)
        second = state["second_moment"].lerp_(grad.square().sum((-2, -1)), 1 - beta2)
        w = skew_direction(x, momentum / correct1)
        wx = w @ x
        state["momentum"] = wx * correct1
        scale = (second / correct2 + group["eps"]).rsqrt()[..., None, None]
        w, wx = w * scale, wx * scale
        return cayley_step(x, w, wx, capped_step(group["lr"], w, group["q"], group["eps"]), group["iterations"])


class CayleySGD(_Cayley):
    """SGD with momentum on the Stiefel manifold through the Cayley transform (Li et al. 2020, Alg. 1).

    Args:
        params: orthogonal matrices ``[..., n, n]``.
        lr: step size.
        momentum: decay of the momentum.
        eps: added to norms before dividing.
        q: cap of the step, ``min(lr, 2q / (||W|| + eps))``.
        iterations: fixed-point passes of the Cayley transform.

    Raises:
        ConfigError: when a setting is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        eps: float = 1e-8,
        q: float = 0.5,
        iterations: int = 5,
    ) -> None:
        _check(lr, (momentum,), eps, q, iterations)
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "q": q, "iterations": iterations})

    def _update(self, x: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(x)
        w = skew_direction(x, state["momentum"] * group["momentum"] + grad)
        wx = state["momentum"] = w @ x
        return cayley_step(x, w, wx, capped_step(group["lr"], w, group["q"], group["eps"]), group["iterations"])
