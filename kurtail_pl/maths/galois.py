"""Finite fields GF(p^r), as far as Paley's Hadamard matrices need them.

An element of GF(p^r) is a polynomial over GF(p) of degree below r. It is stored as its coefficients, lowest first, in
the last dimension of an int64 tensor, or as the integer that has those coefficients as digits in base p.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def prime_power(q: int) -> tuple[int, int] | None:
    """Write q as a power of a prime.

    Args:
        q: Any integer.

    Returns:
        The prime p and the exponent r with `q == p**r`, or None when q is not a prime power.

    >>> prime_power(343), prime_power(461), prime_power(12)
    ((7, 3), (461, 1), None)
    """
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    r = 0
    while q % p == 0:
        q, r = q // p, r + 1
    return (p, r) if q == 1 else None


def jacobsthal_matrix(q: int) -> Tensor:
    """Build the Jacobsthal matrix of GF(q), the quadratic character of all differences (Paley 1933).

    Args:
        q: Power of an odd prime.

    Returns:
        `[q, q]` float64 with entry (i, j) equal to chi(a_i - a_j): 0 for zero, 1 for a square, -1 for a non-square.

    Raises:
        ValueError: q is not a power of an odd prime.

    >>> jacobsthal_matrix(3)
    tensor([[ 0., -1.,  1.],
            [ 1.,  0., -1.],
            [-1.,  1.,  0.]], dtype=torch.float64)
    """
    field = prime_power(q)
    if field is None or field[0] == 2:
        raise ValueError(f"the Jacobsthal matrix needs a power of an odd prime, got {q}")
    p, r = field
    elements = _digits(torch.arange(q), p, r)
    squares = _reduce(_multiply(elements, elements, p), _irreducible(p, r), p)
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[_integers(squares, p)] = 1.0
    chi[0] = 0.0
    return chi[_integers((elements[:, None] - elements[None, :]) % p, p)]


def _digits(integers: Tensor, p: int, count: int) -> Tensor:
    """Return the `count` lowest base-p digits of `integers`, `[...]` -> `[..., count]`."""
    return integers[..., None] // p ** torch.arange(count) % p


def _integers(digits: Tensor, p: int) -> Tensor:
    """Return the integers with these base-p digits, `[..., count]` -> `[...]`."""
    return (digits * p ** torch.arange(digits.shape[-1])).sum(-1)


def _multiply(left: Tensor, right: Tensor, p: int) -> Tensor:
    """Multiply polynomials over GF(p), `[..., m]` and `[..., n]` -> `[..., m + n - 1]`."""
    n = right.shape[-1]
    shifted = [pad(left * right[..., i : i + 1], (i, n - 1 - i)) for i in range(n)]
    return torch.stack(shifted).sum(0) % p


def _reduce(polynomials: Tensor, modulus: Tensor, p: int) -> Tensor:
    """Return the remainders by a monic modulus `[r + 1]` over GF(p), `[..., m]` -> `[..., r]`."""
    r = modulus.shape[0] - 1
    remainder = polynomials.clone()
    for top in range(polynomials.shape[-1] - 1, r - 1, -1):
        remainder[..., top - r : top + 1] -= remainder[..., top : top + 1] * modulus
    return remainder[..., :r] % p


def _irreducible(p: int, r: int) -> Tensor:
    """Return the first monic polynomial of degree r that is irreducible over GF(p), `[r + 1]`.

    A sieve: cross out all products of two monic polynomials of degrees d and r - d. One is always left.
    """
    irreducible = torch.ones(p**r, dtype=torch.bool)
    for d in range(1, r // 2 + 1):
        products = _multiply(_monic(p, d)[:, None], _monic(p, r - d)[None, :], p)
        irreducible[_integers(products[..., :r], p)] = False
    return _monic(p, r)[irreducible.nonzero()[0, 0]]


def _monic(p: int, degree: int) -> Tensor:
    """Return all monic polynomials of a degree over GF(p), `[p^degree, degree + 1]`."""
    lower = _digits(torch.arange(p**degree), p, degree)
    return torch.cat([lower, torch.ones_like(lower[:, :1])], dim=1)
