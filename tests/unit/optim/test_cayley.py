"""Cayley Adam and SGD against the paper's algorithms written out in float64, and on problems with a known optimum."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.maths.kurtosis import kurtail_loss, rms_norm
from kurtail_pl.optim import CayleyAdam, CayleySGD

Optimizers = type[CayleyAdam] | type[CayleySGD]
BOTH = pytest.mark.parametrize("optimizer", [CayleyAdam, CayleySGD])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(count: int, n: int) -> Tensor:
    return torch.from_numpy(scipy.stats.special_ortho_group.rvs(n, size=count, random_state=0).reshape(count, n, n))


def error_of(x: Tensor) -> float:
    x = x.detach().double()
    return (x.mT @ x - torch.eye(x.shape[-1]).double()).abs().max().item()


def walk(
    start: Tensor, gradients: Tensor, optimizer: Optimizers, dtype: torch.dtype = torch.float64, **settings: Any
) -> Tensor:
    """Where the optimizer arrives when each step meets the next of the gradients ``[steps, *start.shape]``."""
    x = start.to(dtype, copy=True).requires_grad_()
    stepper = optimizer([x], **settings)
    for gradient in gradients:
        x.grad = gradient.to(dtype)
        stepper.step()
    return x.detach()


def cayley_curve(x: np.ndarray, w: np.ndarray, lr: float, q: float, eps: float, iterations: int) -> np.ndarray:
    a = min(lr, 2 * q / (float(np.linalg.norm(w)) + eps))
    y: np.ndarray = x - a * w @ x
    for _ in range(iterations):
        y = x - a / 2 * w @ (x + y)
    return y @ (1.5 * np.eye(len(y)) - 0.5 * y.T @ y)  # one Newton-Schulz pass towards the nearest orthogonal matrix


def textbook_adam(
    x: np.ndarray, gradients: np.ndarray, lr: float, b1: float, b2: float, eps: float, q: float, iterations: int
) -> np.ndarray:
    """Li et al. 2020, Alg. 2, for one matrix."""
    m, v = np.zeros_like(x), 0.0
    for k, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * float(np.linalg.norm(g)) ** 2
        r = (1 - b1**k) * np.sqrt(v / (1 - b2**k) + eps)
        a = 0.5 * m @ x.T  # m @ x.T - 0.5 * x @ (x.T @ m @ x.T), for a square x
        w = (a - a.T) / r
        m = r * w @ x
        x = cayley_curve(x, w, lr, q, eps, iterations)
    return x


def textbook_sgd(
    x: np.ndarray, gradients: np.ndarray, lr: float, momentum: float, eps: float, q: float, iterations: int
) -> np.ndarray:
    """Li et al. 2020, Alg. 1, for one matrix, with the sign of the gradient in the step."""
    m = np.zeros_like(x)
    for g in gradients:
        m = momentum * m + g
        a = 0.5 * m @ x.T  # m @ x.T - 0.5 * x @ (x.T @ m @ x.T), for a square x
        w = a - a.T
        m = w @ x
        x = cayley_curve(x, w, lr, q, eps, iterations)
    return x


@pytest.mark.parametrize("lr", [0.05, 1.5], ids=["free", "capped"])
@pytest.mark.parametrize("b1", [0.9, 0.0])
@pytest.mark.parametrize("b2", [0.99, 0.5])
@pytest.mark.parametrize(("eps", "q", "iterations"), [(1e-8, 0.5, 5), (0.3, 0.2, 2)])
def test_adam_equals_the_textbook(lr: float, b1: float, b2: float, eps: float, q: float, iterations: int) -> None:
    # Gradients of three sizes: one second moment for each matrix, not for the stack.
    start, gradients = rotations(3, 6), random(20, 3, 6, 6) * torch.tensor([0.01, 1, 100]).double()[:, None, None]
    result = walk(start, gradients, CayleyAdam, lr=lr, betas=(b1, b2), eps=eps, q=q, iterations=iterations)
    for i in range(3):
        expected = textbook_adam(start[i].numpy(), gradients[:, i].numpy(), lr, b1, b2, eps, q, iterations)
        torch.testing.assert_close(result[i], torch.from_numpy(expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("lr", [0.001, 1.5], ids=["free", "capped"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(("eps", "q", "iterations"), [(1e-8, 0.5, 5), (0.3, 0.2, 2)])
def test_sgd_equals_the_textbook(lr: float, momentum: float, eps: float, q: float, iterations: int) -> None:
    start, gradients = rotations(3, 6), random(20, 3, 6, 6) * torch.tensor([0.01, 1, 3]).double()[:, None, None]
    result = walk(start, gradients, CayleySGD, lr=lr, momentum=momentum, eps=eps, q=q, iterations=iterations)
    for i in range(3):
        expected = textbook_sgd(start[i].numpy(), gradients[:, i].numpy(), lr, momentum, eps, q, iterations)
        torch.testing.assert_close(result[i], torch.from_numpy(expected), rtol=0, atol=1e-11)


@BOTH
@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("lr", [0.1, 1.5])
def test_stack_equals_separate_matrices_bit_for_bit(optimizer: Optimizers, n: int, lr: float) -> None:
    start, gradients = rotations(5, n), random(15, 5, n, n) * torch.logspace(-2, 2, 5).double()[:, None, None]
    stacked = walk(start, gradients, optimizer, torch.float32, lr=lr)
    for i in range(5):
        alone = walk(start[i : i + 1], gradients[:, i : i + 1], optimizer, torch.float32, lr=lr)
        assert torch.equal(stacked[i], alone[0])
        # Without the leading dimension torch multiplies by another routine, which may round otherwise.
        bare = walk(start[i], gradients[:, i], optimizer, torch.float32, lr=lr)
        torch.testing.assert_close(stacked[i], bare, rtol=0, atol=1e-5)


@BOTH
def test_two_leading_dimensions_equal_one(optimizer: Optimizers) -> None:
    start, gradients = rotations(6, 8), random(10, 6, 8, 8)
    flat = walk(start, gradients, optimizer)
    assert torch.equal(
        walk(start.reshape(2, 3, 8, 8), gradients.reshape(10, 2, 3, 8, 8), optimizer).flatten(0, 1), flat
    )


def quartic_loss(x: Tensor) -> Tensor:
    """Mean fourth power of rotated rows whose channels differ in size, summed over the matrices."""
    n = x.shape[-1]
    rows = random(4 * n, n, seed=3) * torch.linspace(0.2, 1, n).double()
    return (rows.to(x.dtype) @ x).pow(4).mean((-2, -1)).sum()


@BOTH
@pytest.mark.parametrize("lr", [0.1, 1.5, 5.0])
@pytest.mark.parametrize("n", [16, 64])
def test_stays_orthogonal_in_float32(optimizer: Optimizers, lr: float, n: int) -> None:
    x = rotations(2, n).float().requires_grad_()
    stepper = optimizer([x], lr=lr)
    first = quartic_loss(x).item()
    for _ in range(100):
        stepper.zero_grad()
        torch.autograd.backward(quartic_loss(x))
        stepper.step()
        assert error_of(x) < 1e-5
    assert quartic_loss(x).item() < 0.9 * first


@BOTH
@pytest.mark.parametrize("lr", [0.1, 1.5, 5.0])
def test_stays_orthogonal_in_float32_when_the_gradient_turns_one_plane_only(optimizer: Optimizers, lr: float) -> None:
    # All of W's norm then lies in one pair of singular values: the slowest convergence that the cap allows.
    gradient = torch.zeros(100, 64, 64)
    gradient[:, 0, 1] = 1
    assert error_of(walk(torch.eye(64), gradient, optimizer, torch.float32, lr=lr)) < 1e-5


@pytest.mark.parametrize("lr", [0.1, 1.5, 5.0])
def test_stays_orthogonal_in_float32_when_two_channels_hold_outliers(lr: float) -> None:
    # The method's own loss on activations as language models have them: the gradient is of low rank.
    x = random_hadamard(64, torch.Generator().manual_seed(0))[None].float().requires_grad_()
    stepper = CayleyAdam([x], lr=lr)
    rows = random(4, 128, 64).float()
    rows[..., 3] *= 100
    rows[..., 32] *= 40
    for _ in range(100):
        stepper.zero_grad()
        torch.autograd.backward(kurtail_loss(rms_norm(rows @ x[0], 1e-5)).mean())
        stepper.step()
    assert error_of(x) < 1e-5


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_finds_the_procrustes_optimum(optimizer: Optimizers, noise: float) -> None:
    # min ||A X - B||: the optimum is the polar factor of A^T B, here in the component of the start (det 1).
    a = random(50, 8)
    b = a @ rotations(1, 8)[0] + noise * random(50, 8, seed=2)
    optimum = torch.from_numpy(scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())[0])
    assert torch.linalg.det(optimum).item() == pytest.approx(1)
    x = torch.eye(8, dtype=torch.float64, requires_grad=True)
    stepper = optimizer([x], lr=0.2 if optimizer is CayleyAdam else 0.002)
    for _ in range(400):
        stepper.zero_grad()
        torch.autograd.backward((a @ x - b).square().sum() / 2)
        stepper.step()
    torch.testing.assert_close(x.detach(), optimum, rtol=0, atol=1e-3)


@BOTH
def test_first_step_goes_downhill(optimizer: Optimizers) -> None:
    start, gradient = rotations(4, 6), random(4, 6, 6)
    moved = walk(start, gradient[None], optimizer, lr=1e-4) - start
    assert ((moved * gradient).sum((-2, -1)) < 0).all()


def test_adam_ignores_the_size_of_the_gradient() -> None:
    start, gradients = rotations(1, 6), random(10, 1, 6, 6)
    first, second = (walk(start, f * gradients, CayleyAdam, lr=0.1, eps=1e-16) for f in (1, 1000))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@BOTH
def test_state_dict_resumes_bit_identically(optimizer: Optimizers) -> None:
    start, gradients = rotations(3, 8), random(20, 3, 8, 8)
    through = walk(start, gradients, optimizer, torch.float32, lr=0.3)

    x = start.float().requires_grad_()
    stepper = optimizer([x], lr=0.3)
    for gradient in gradients[:9]:
        x.grad = gradient.float()
        stepper.step()
    saved, y = stepper.state_dict(), x.detach().clone().requires_grad_()
    resumed = optimizer([y])  # its lr comes from the saved state too
    resumed.load_state_dict(saved)
    for gradient in gradients[9:]:
        y.grad = gradient.float()
        resumed.step()
    assert torch.equal(y.detach(), through)
    assert not torch.equal(walk(x.detach(), gradients[9:], optimizer, torch.float32, lr=0.3), through)


@BOTH
def test_zero_gradient_moves_nothing(optimizer: Optimizers) -> None:
    start = rotations(2, 6)
    torch.testing.assert_close(walk(start, torch.zeros(3, 2, 6, 6), optimizer), start, rtol=0, atol=1e-14)


@BOTH
def test_parameters_without_gradient_stay(optimizer: Optimizers) -> None:
    x, y = (rotations(1, 4).requires_grad_() for _ in range(2))
    x.grad = random(1, 4, 4)
    stepper = optimizer([x, y])
    stepper.step()
    assert torch.equal(y, rotations(1, 4))
    assert not torch.equal(x, rotations(1, 4))


@BOTH
def test_closure_is_called_with_gradients_on_and_its_loss_returned(optimizer: Optimizers) -> None:
    x = rotations(1, 6).requires_grad_()
    stepper = optimizer([x])

    def closure() -> float:
        stepper.zero_grad()
        loss = quartic_loss(x)
        torch.autograd.backward(loss)
        return loss.item()

    expected = quartic_loss(x).item()
    assert stepper.step(closure) == expected
    assert quartic_loss(x).item() < expected


@BOTH
def test_groups_have_their_own_lr(optimizer: Optimizers) -> None:
    start, gradient = rotations(1, 4), random(1, 1, 4, 4)
    x, y = (start.clone().requires_grad_() for _ in range(2))
    groups: list[Any] = [{"params": [x], "lr": 0.01}, {"params": [y]}]
    stepper = optimizer(groups, lr=0.001)
    x.grad, y.grad = gradient[0].clone(), gradient[0].clone()
    stepper.step()
    assert torch.equal(x.detach(), walk(start, gradient, optimizer, lr=0.01))
    assert torch.equal(y.detach(), walk(start, gradient, optimizer, lr=0.001))


@BOTH
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (4,)])
def test_parameters_that_are_not_square_raise(optimizer: Optimizers, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    x.grad = torch.ones(shape)
    with pytest.raises(ValueError, match=r"shape \(" + ", ".join(map(str, shape))):
        optimizer([x]).step()


def adam(**settings: Any) -> CayleyAdam:
    return CayleyAdam([torch.eye(2)], **settings)


def sgd(**settings: Any) -> CayleySGD:
    return CayleySGD([torch.eye(2)], **settings)


@pytest.mark.parametrize(
    ("make", "settings", "value"),
    [
        *((make, {"lr": lr}, lr) for make in (adam, sgd) for lr in (0.0, -0.1)),
        *((make, {"iterations": count}, count) for make in (adam, sgd) for count in (0, -1)),
        *((sgd, {"momentum": beta}, beta) for beta in (1.0, -0.1, 1.5)),
        *((adam, {"betas": (beta, 0.99)}, beta) for beta in (1.0, 1.5)),
        *((adam, {"betas": (0.9, beta)}, beta) for beta in (1.0, 1.5)),
    ],
)
def test_settings_out_of_range_raise(make: Callable[..., Any], settings: dict[str, Any], value: float) -> None:
    with pytest.raises(ValueError, match=rf" is {value};"):
        make(**settings)


@pytest.mark.parametrize("betas", [(-0.1, 0.99), (0.9, -0.1), (float("nan"), 0.99), (0.9, float("nan"))])
def test_negative_or_nan_betas_raise(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"-0\.1|nan"):
        adam(betas=betas)


@pytest.mark.parametrize("make", [adam, sgd])
@pytest.mark.parametrize(("field", "value"), [("q", 0.0), ("q", -0.5), ("eps", -1.0), ("lr", float("nan"))])
def test_cap_eps_and_nan_lr_out_of_range_raise(make: Callable[..., Any], field: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(str(value))):
        make(**{field: value})
