"""Hadamard matrices of every width, dense and as two Kronecker factors for the online rotations.

KurTail (arXiv 2503.01483) rotates queries and keys, the input of the attention output and the hidden layer of the MLP
by Hadamard matrices that are computed online, and starts the learned rotations from random ones. Model widths are
seldom powers of two, so the odd part comes from Paley's constructions (R. Paley, "On orthogonal matrices", 1933), or
from the Hartley matrix, which exists for every size, where Paley has none.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kurtail_pl.maths.constructions import odd_part, sylvester
from kurtail_pl.maths.orthogonal import random_signs


@dataclass(frozen=True, eq=False)
class HadamardFactors:
    """An orthogonal matrix of order c * a * b: c equal blocks on the diagonal, each of two Kronecker factors.

    Attributes:
        left: `[a, a]` float64, orthonormal; the odd part of a block's order and the remaining powers of two. A stack
            `[n, a, a]` stands for n matrices, of which `of` gives one.
        right: `[b, b]` float64, orthonormal; a Sylvester matrix, possibly with signs on its rows or columns. As many.
        construction: What the matrix is made of, for reports, as in "Paley I GF(11) x Sylvester 4".
        blocks: How many, c; 1 mixes all channels.
        signs: `[c * a * b]` of 1 and -1, which the channels have before they are mixed; whoever writes the channels
            writes them so, and no transform here knows them. None where the factors hold signs of their own, or none.
    """

    left: Tensor
    right: Tensor
    construction: str
    blocks: int = 1
    signs: Tensor | None = None

    @property
    def block(self) -> int:
        """Order a * b of one block."""
        return self.left.shape[-1] * self.right.shape[-1]

    @property
    def size(self) -> int:
        """Order c * a * b of the whole matrix."""
        return self.blocks * self.block

    @property
    def multiplications(self) -> int:
        """Of one row, by two products with the factors; kernels for Sylvester's matrix do with additions."""
        return self.size * (self.left.shape[-1] + self.right.shape[-1])

    @property
    def is_sylvester(self) -> bool:
        """Whether a block is Sylvester's matrix itself, for which runtimes have fast kernels."""
        factors = self.left, self.right
        return all(
            len(factor) & (len(factor) - 1) == 0 and torch.equal(factor, sylvester(len(factor)).to(factor))
            for factor in factors
        )

    def sylvester_signs(self) -> tuple[Tensor, Tensor] | None:
        """Return signs r and c, `[a * b]` both, of a block that is `diag(r) S diag(c)`, S being Sylvester's matrix.

        None where a block is no such matrix: its order is no power of two.
        """
        found = [_signs(factor) for factor in (self.left, self.right)]
        if None in found:
            return None
        (left_rows, left_columns), (right_rows, right_columns) = (signs for signs in found if signs is not None)
        return torch.kron(left_rows, right_rows), torch.kron(left_columns, right_columns)

    def of(self, number: int) -> "HadamardFactors":
        """Return one matrix of a stack."""
        return replace(self, left=self.left[number], right=self.right[number])

    def dense(self) -> Tensor:
        """Return the whole matrix, `kron(I, left, right)`, `[c * a * b, c * a * b]`."""
        block = torch.kron(self.left, self.right)
        return block if self.blocks == 1 else torch.kron(torch.eye(self.blocks).to(block), block)

    def transposed(self) -> "HadamardFactors":
        """Return the factors of the transpose, which is the inverse: fused into a weight it undoes the transform."""
        return replace(self, left=self.left.mT.contiguous(), right=self.right.mT.contiguous())


def hadamard_factors(n: int) -> HadamardFactors:
    """Choose two orthonormal Kronecker factors of near-equal size for a width.

    The width is k * 2^m with k the smallest order of that form that is 1 or Paley's, or, where there is none, the odd
    part of n, for which the Hartley matrix stands in: orthogonal too, its entries at most sqrt(2 / k).

    Args:
        n: Width, at least 1.

    Returns:
        The factors, new tensors; the same for every call.

    Raises:
        ValueError: n is below 1.

    >>> factors = hadamard_factors(576)
    >>> factors.left.shape[0], factors.right.shape[0], factors.construction
    (36, 16, 'Paley II GF(17) x Sylvester 16')
    """
    if n < 1:
        raise ValueError(f"a Hadamard transform needs a width of at least 1, got {n}")
    core, name = odd_part(n)
    doublings = n // core.shape[0]
    # a + b multiplications per entry; of two equal sums the larger right factor, since a fast kernel may take it.
    b = min((2**j for j in range(doublings.bit_length())), key=lambda b: (n // b + b, -b))
    parts = [name] if name else []
    if doublings > 1 or not parts:
        parts.append(f"Sylvester {doublings}")
    return HadamardFactors(torch.kron(core, sylvester(doublings // b)), sylvester(b), " x ".join(parts))


def random_hadamard_factors(n: int, generator: torch.Generator, block: int | None = None) -> HadamardFactors:
    """Choose the factors of a width and give the rows of each random signs.

    The signs are part of the factors, so the online transform has no sign multiplication of its own.

    Args:
        n: Width, at least 1.
        generator: CPU source of the signs.
        block: Neighbouring channels that are mixed, a power of two that divides n; None mixes all.

    Returns:
        `left = diag(s_a) L` and `right = diag(s_b) R` for the factors L, R of `hadamard_factors(n)`, or of
        `block_hadamard_factors(n, block)`.

    Raises:
        ValueError: n is below 1, or there are no such blocks.
    """
    plain = hadamard_factors(n) if block is None else block_hadamard_factors(n, block)
    left, right = (random_signs(factor.shape[0], generator)[:, None] * factor for factor in (plain.left, plain.right))
    return replace(plain, left=left, right=right)


def block_hadamard_factors(n: int, block: int) -> HadamardFactors:
    """Choose the factors of a matrix with Sylvester blocks on its diagonal, which mixes neighbours alone.

    It exists for widths of which no Hadamard matrix is known, and costs less: signs do not stand in the factors, so
    that a fast kernel can compute them.

    Args:
        n: Width.
        block: Order of a block, a power of two that divides n; `widest_block(n)` is the largest.

    Returns:
        Factors a, b of near-equal size with `a * b == block`, and `n // block` blocks.

    Raises:
        ValueError: The block is no power of two, or does not divide n.

    >>> block_hadamard_factors(1536, 512).construction
    '3 blocks of Sylvester 512'
    """
    if block < 1 or block & (block - 1) or n % block:
        raise ValueError(f"blocks of a Hadamard transform are powers of two that divide its width {n}, got {block}")
    plain, blocks = hadamard_factors(block), n // block
    of = "" if blocks == 1 else f"{blocks} blocks of "
    return replace(plain, construction=of + plain.construction, blocks=blocks)


def widest_block(n: int) -> int:
    """Return the largest power of two that divides a width.

    >>> widest_block(1536), widest_block(18944)
    (512, 512)
    """
    return n & -n


def random_hadamard(n: int, generator: torch.Generator, block: int | None = None) -> Tensor:
    """Draw a dense random Hadamard matrix, the start of the learned rotations (QuaRot, arXiv 2404.00456, section 3).

    Args:
        n: Width, at least 1.
        generator: CPU source of the n independent signs.
        block: Neighbouring channels that it mixes, a power of two that divides n; None mixes all.

    Returns:
        `diag(s) kron(left, right)`, or `diag(s) kron(I, left, right)` in blocks, `[n, n]` float64, orthogonal.

    Raises:
        ValueError: n is below 1, or there are no such blocks.
    """
    factors = hadamard_factors(n) if block is None else block_hadamard_factors(n, block)
    return random_signs(n, generator)[:, None] * factors.dense()


def hadamard_transform(x: Tensor, factors: HadamardFactors) -> Tensor:
    """Multiply the rows of x by `kron(I, left, right)` without building it.

    Each block of a row, reshaped to X `[a, b]`, becomes `left.T @ X @ right`. The factors are cast to the dtype and
    device of x, so in half precision their entries are rounded (the norm is off by up to 0.4 % per factor in bfloat16):
    cast x to float32 where that matters.

    Args:
        x: `[..., n]`, real floating point.
        factors: Factors of order n; on another device than x they are copied there in every call.

    Returns:
        `x @ factors.dense()`, `[..., n]`, dtype and device of x.

    Raises:
        ValueError: The last dimension of x is not the order of the factors.

    >>> hadamard_transform(torch.eye(2), hadamard_factors(2)) * 2**0.5
    tensor([[ 1.0000,  1.0000],
            [ 1.0000, -1.0000]])
    """
    if x.shape[-1] != factors.size:
        raise ValueError(f"rows of width {x.shape[-1]} do not fit a Hadamard transform of size {factors.size}")
    left, right = factors.left.to(x), factors.right.to(x)
    blocks = () if factors.blocks == 1 else (factors.blocks,)
    by_right = x.reshape(*x.shape[:-1], *blocks, left.shape[0], right.shape[0]) @ right
    # With the small matrix on the right torch runs one large product instead of one small product per row.
    return (by_right.mT @ left).mT.reshape(x.shape)


def _signs(factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the signs of the rows and columns of Sylvester's matrix, `[n]` both; None where it is another matrix.

    Its first row and column are constant before the signs; the sign common to both is counted in the rows.
    """
    order = len(factor)
    if order & (order - 1):
        return None
    rows = factor[:, 0].sign()
    columns = factor[0].sign() * rows[0]
    plain = rows[:, None] * sylvester(order).to(factor) * columns
    return (rows, columns) if torch.allclose(factor, plain, rtol=0, atol=1e-6) else None
