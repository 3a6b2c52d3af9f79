"""A side of low rank (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.finite import half_or_float
from kurtail_pl.maths.low_rank import low_rank, output_square
from kurtail_pl.methods.cost import FLOAT16, Cost, Sizes
from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.methods.rounder import Moments, Needs
from kurtail_pl.methods.side import Side


@dataclass(frozen=True)
class LowRank(Side):
    """The nearest matrix of a rank, as two of float16: ``down [rank, in]``, which readers share, ``up [out, rank]``.

    The rest has smaller numbers, so rounding loses less of them and of the inputs that they multiply (SVDQuant, section
    4.2). What float16 loses of both matrices the rest holds. Where it does not hold them they are float32.

    Args:
        rank: of the side.
        rounds: sides that are tried. The first is nearest to the weight, all its numbers alike: what rounding loses
            goes with the size of what is left. Each next one is nearest to what the rounded rest before it leaves (so
            have LQER, arXiv 2402.02446, and QERA, arXiv 2410.06040, their only one). The first that leaves no smaller
            error is the last, and the best is taken.
        weighted: errors of rounding count as the inputs of the calibration text see them; else by their size alone.

    Raises:
        ConfigError: when rank or rounds are less than 1.
    """

    rank: int = 32
    rounds: int = 1
    weighted: bool = True

    label = "low-rank"
    shared = ("down",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"side.{name} is {getattr(self, name)}; give a positive number")

    def sentence(self) -> str:
        """Rank and bits."""
        return f"a side of rank {self.rank} in 16 bits, which reads the inputs before they are rounded"

    @property
    def needs(self) -> Needs:
        """Inputs weigh errors, which one round does not look at."""
        return Needs.INPUTS if self.weighted and self.rounds > 1 else Needs.NOTHING

    def require(self, widths: tuple[int, ...]) -> None:
        """A rank is at most the width of what is read, and weights that read the same are higher than that."""
        if self.rank > min(widths):
            raise ConfigError(
                f"side.rank is {self.rank} and the narrowest linears of this model read {min(widths)} channels; give "
                "at most that"
            )

    def cost(self, sizes: Sizes) -> Cost:
        """Both matrices on the disk; two products of each weight and, where sides are compared, its rounding."""
        again = 0 if self.rounds == 1 else 1
        return Cost(
            copies=6,
            doubles=4 if self.needs else 0,
            disk=FLOAT16 * self.rank * sizes.ends,
            flops=self.rounds * (4.0 + again) * sizes.widest * sizes.stack,
        )

    def fitted(self, weight: Tensor, moments: Moments, lost: Callable[[Tensor], Tensor]) -> Tensors:
        """By singular values, again for what the rounded rest leaves.

        Raises:
            torch.linalg.LinAlgError: when the damped Hessian is not positive definite.
        """
        hessian = moments.hessian if self.needs else None
        wanted = exact = weight.double()
        best: Tensors = {}
        least = math.inf
        for number in range(self.rounds):
            up, down = low_rank(wanted, self.rank, hessian if number else None)
            found = {"down": half_or_float(down), "up": half_or_float(up)}
            if self.rounds == 1:
                return found
            side = self.dense(found, exact.shape[1])
            error = lost(exact - side).double()
            size = output_square(error, hessian)
            if best and size >= least:
                break
            best, least, wanted = found, size, side + error
        return best

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Down and up."""
        return {
            "down": Buffer((self.rank, columns), torch.float16),
            "up": Buffer((rows, self.rank), torch.float16),
        }

    def dense(self, tensors: Tensors, columns: int) -> Tensor:
        """Up times down."""
        return tensors["up"].double() @ tensors["down"].double()

    def product(self, x: Tensor, tensors: Tensors) -> Tensor:
        """First to the rank."""
        return F.linear(F.linear(x, tensors["down"].to(x.dtype)), tensors["up"].to(x.dtype))
