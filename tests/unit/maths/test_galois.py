"""Jacobsthal matrices against their defining identities, and against Euler's criterion for prime fields."""

import pytest
import torch

from kurtail_pl.maths.galois import jacobsthal_matrix, prime_power

PRIMES = [3, 5, 7, 11, 13, 17, 19, 43, 73, 107, 139]
PRIME_POWERS = [9, 25, 27, 49, 81, 121, 125, 243, 343, 361]


@pytest.mark.parametrize("q", [*PRIMES, *PRIME_POWERS, 461])
def test_jacobsthal_identities(q: int) -> None:
    matrix = jacobsthal_matrix(q)
    ones = torch.ones(q, q, dtype=torch.float64)
    assert matrix.shape == (q, q)
    assert matrix.dtype == torch.float64
    assert set(matrix.flatten().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert not (matrix @ ones).any()
    assert not (ones @ matrix).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("q", PRIMES)
def test_prime_field_follows_eulers_criterion(q: int) -> None:
    euler = [(pow(a, (q - 1) // 2, q) + 1) % q - 1 for a in range(q)]
    assert jacobsthal_matrix(q)[:, 0].tolist() == euler


def test_prime_power_agrees_with_powers_of_sieved_primes() -> None:
    limit = 1200
    primes = [p for p in range(2, limit) if all(p % d for d in range(2, p))]
    powers = {p**r: (p, r) for p in primes for r in range(1, 11) if p**r < limit}
    for q in range(-2, limit):
        assert prime_power(q) == powers.get(q), q


@pytest.mark.parametrize("q", [-3, 0, 1, 2, 8, 15, 1000])
def test_jacobsthal_refuses_other_sizes(q: int) -> None:
    with pytest.raises(ValueError, match=f"power of an odd prime, got {q}$"):
        jacobsthal_matrix(q)
