"""Kronecker maps against dense products and numpy's inverse; gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kurtail_pl.maths.hadamard import hadamard_factors, hadamard_transform
from kurtail_pl.maths.kronecker import Kronecker, kronecker_transform, nearest_sizes

SIZES = [(1, 5), (4, 1), (3, 7), (6, 4)]


def random_map(a: int, b: int, seed: int = 0) -> Kronecker:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (a, b))
    return Kronecker(left, right)


def rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, n, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_dense_product(sizes: tuple[int, int]) -> None:
    found, x = random_map(*sizes), rows(sizes[0] * sizes[1])
    dense = np.kron(found.left.numpy(), found.right.numpy())
    np.testing.assert_allclose(kronecker_transform(x, found).numpy(), x.numpy() @ dense, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.dense().numpy(), dense)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_transposed_inverse_is_numpys(sizes: tuple[int, int]) -> None:
    """And a weight times it gives what the weight gave."""
    found = random_map(*sizes)
    dense, back = found.dense().numpy(), found.inverse_transposed()
    np.testing.assert_allclose(back.dense().numpy(), np.linalg.inv(dense).T, rtol=1e-9, atol=1e-9)
    assert found.condition() == pytest.approx(np.linalg.cond(dense), rel=1e-9)
    x = rows(sizes[0] * sizes[1])
    weight = torch.randn(5, x.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = kronecker_transform(x, found) @ kronecker_transform(weight, back).T
    np.testing.assert_allclose(y.numpy(), (x @ weight.T).numpy(), rtol=1e-8, atol=1e-8)


def test_an_orthogonal_one_is_the_hadamard_transform_bit_for_bit() -> None:
    factors = hadamard_factors(172)
    x = rows(172, torch.float32)
    expected = hadamard_transform(x, factors)
    assert torch.equal(kronecker_transform(x, Kronecker(factors.left, factors.right)), expected)
    back = Kronecker(factors.left, factors.right).inverse_transposed()
    torch.testing.assert_close(back.dense(), factors.dense(), rtol=0, atol=1e-13)


def test_gradients_are_those_of_finite_differences() -> None:
    found, x = random_map(3, 4), rows(12)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, found.left, found.right)]
    assert gradcheck(lambda x, left, right: kronecker_transform(x, Kronecker(left, right)), leaves)


def test_sizes_are_the_divisors_nearest_to_the_root() -> None:
    for n in range(1, 200):
        a, b = nearest_sizes(n)
        assert a * b == n
        assert a + b == min(d + n // d for d in range(1, n + 1) if n % d == 0)
    # FlatQuant's own, and widths of 2 mod 4, for which the difference of two squares that it seeks does not exist.
    assert [nearest_sizes(n) for n in (4096, 11008, 14336, 90)] == [(64, 64), (86, 128), (112, 128), (9, 10)]


@pytest.mark.parametrize("orders", [(1, 16), (6, 8)])
def test_rows_have_the_same_bits_in_every_layout(orders: tuple[int, int]) -> None:
    """Heads of a linear's output lie otherwise in memory than the same heads out of a cache."""
    draw = torch.Generator().manual_seed(3)
    kronecker = Kronecker(*(torch.randn(n, n, generator=draw) for n in orders))
    heads = torch.randn(1, 57, 2, orders[0] * orders[1], generator=draw).transpose(1, 2)
    assert not heads.is_contiguous()
    assert torch.equal(kronecker_transform(heads, kronecker), kronecker_transform(heads.contiguous(), kronecker))
