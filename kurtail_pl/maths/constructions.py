"""Hadamard matrices by Sylvester's and Paley's constructions, and the Hartley matrix for orders that have none."""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from kurtail_pl.maths.galois import jacobsthal_matrix, prime_power


def hadamard_matrix(order: int) -> Tensor:
    """Build a Hadamard matrix: Sylvester for powers of two, else Paley I, Paley II, or the double of a smaller one.

    Args:
        order: Number of rows.

    Returns:
        `[order, order]` float64, a new tensor, entries exactly 1 and -1, `H @ H.T == order * I`.

    Raises:
        ValueError: No construction is known for this order.

    >>> hadamard_matrix(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    base = order
    while base > 1 and base % 2 == 0 and _paley_field(base) is None:
        base //= 2
    paley = _paley_field(base)
    if paley is not None:
        kind, p, r = paley
        matrix = _paley_one(p**r) if kind == "I" else _paley_two(p**r)
    elif base == 1:
        matrix = torch.ones(1, 1, dtype=torch.float64)
    else:
        raise ValueError(f"no construction is known for a Hadamard matrix of order {order}")
    while matrix.shape[0] < order:
        matrix = torch.kron(_block(1, 1, 1, -1), matrix)
    return matrix


@functools.lru_cache(maxsize=16)
def odd_part(n: int) -> tuple[Tensor, str]:
    """Return the orthonormal odd-part factor `[k, k]` of a width and its name; empty for a power of two."""
    odd = n // (n & -n)
    if odd == 1:
        return sylvester(1), ""
    order = odd
    while n % order == 0:
        paley = _paley_field(order)
        if paley is not None:
            kind, p, r = paley
            field = f"{p}^{r}" if r > 1 else f"{p}"
            return hadamard_matrix(order) / math.sqrt(order), f"Paley {kind} GF({field})"
        order *= 2
    return _hartley(odd), f"Hartley {odd}"


def _paley_field(order: int) -> tuple[str, int, int] | None:
    """Return the construction, I or II, and p, r of its field GF(p^r) for an order that is not a power of two."""
    if order < 1 or order % 4 or order & (order - 1) == 0:
        return None
    for kind, q, residue in (("I", order - 1, 3), ("II", order // 2 - 1, 1)):
        field = prime_power(q)
        if field is not None and q % 4 == residue:
            return kind, *field
    return None


def _paley_one(q: int) -> Tensor:
    """Return Paley's first matrix `I + S`, S skew with a Jacobsthal core; `[q + 1, q + 1]` for q = 3 mod 4."""
    skew = pad(jacobsthal_matrix(q), (1, 0, 1, 0), value=1.0)
    skew[1:, 0] = -1.0
    skew[0, 0] = 0.0
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Return Paley's second matrix, a symmetric conference matrix with 2 x 2 blocks; order 2 (q + 1), q = 1 mod 4."""
    conference = pad(jacobsthal_matrix(q), (1, 0, 1, 0), value=1.0)
    conference[0, 0] = 0.0
    identity = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(conference, _block(1, 1, 1, -1)) + torch.kron(identity, _block(1, -1, -1, -1))


def _block(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64).reshape(2, 2)


def sylvester(order: int) -> Tensor:
    """Return the orthonormal Sylvester matrix of a power of two."""
    return hadamard_matrix(order) / math.sqrt(order)


def _hartley(k: int) -> Tensor:
    """Return the orthonormal Hartley matrix `cas(2 pi i j / k) / sqrt(k)`, cas = cos + sin (Hartley 1942)."""
    index = torch.arange(k)
    # The product is reduced before it becomes an angle: a large angle would cost digits.
    angle = 2 * math.pi / k * (index[:, None] * index % k).double()
    return (angle.cos() + angle.sin()) / math.sqrt(k)
