"""Spending an average number of bits where they help most: among layers, groups of columns or rows of a weight.

HIGGS spends them among layers by dynamic programming (arXiv 2411.17525, the dynamic HIGGS of section 5), SKIM among
rows, each bit where the error falls most (arXiv 2412.04180). Where errors fall ever less from bit to bit both give the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CORE = 256
"""So many parts are decided together, by all that they may cost: as many as models have layers. Of more, the others are
those that a price of a bit decides by itself."""
HALVINGS = 100
"""Of the range that the price of a bit is in."""


def allocate(costs: Tensor, bits: Sequence[int], average: float) -> list[int]:
    """Choose the bits of every part so that the sum of their costs is least.

    Parts are of one size. Up to `CORE` of them are decided exactly, by dynamic programming over the bits; of choices
    that cost the same the one of fewer bits is taken. Of more parts, those that lose most by any other choice than the
    best one at some price of a bit get that, and the others are decided exactly. Where costs are convex and widths
    evenly spaced that is exact, too: each bit then goes where it lowers the cost most.

    Args:
        costs: of each part with each number of bits, ``[parts, choices]``.
        bits: the numbers to choose from, ``choices`` of them.
        average: of all parts' bits, not to be exceeded.

    Returns:
        Bits of every part.

    Raises:
        ValueError: when even the fewest bits are more than the average.

    >>> allocate(torch.tensor([[9.0, 1.0], [3.0, 1.0], [8.0, 1.0]]), (2, 4), average=10 / 3)
    [4, 2, 4]
    """
    parts = len(costs)
    # An average such as 10 / 3 of three parts is ten bits.
    budget = int(average * parts + 1e-6)
    if budget < min(bits) * parts:
        raise ValueError(f"the average is {average} bits and the fewest of a part {min(bits)}; ask for more bits")
    costs, widths = costs.double(), torch.tensor(bits)
    chosen, regret = _at_a_price(costs, widths.to(costs), budget)
    found = widths[chosen.cpu()]
    core = regret.argsort(stable=True)[:CORE].sort().values.cpu()
    found[core] = torch.tensor(_exactly(costs[core].cpu(), bits, budget - int(found.sum() - found[core].sum())))
    return [int(width) for width in found]


def _at_a_price(costs: Tensor, bits: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The cheapest choice of each part when bits have a price, the lowest that spends no more than the budget.

    What is left goes, part by part, to those that would take more at any lower price.

    Returns:
        The choices ``[parts]``, and what the next best of each would cost more, ``[parts]``.
    """

    def cheapest(price: float) -> Tensor:
        return (costs + price * bits).argmin(1)

    low, high = 0.0, 1.0 + 2 * costs.abs().max().item()  # At such a price nobody wants more than the fewest.
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bits[cheapest(middle)].sum() > budget else (low, middle)
    choice, more = cheapest(high), cheapest(low)
    steps = (bits[more] - bits[choice]).cumsum(0)
    choice = torch.where(steps <= budget - bits[choice].sum(), more, choice)
    best = (costs + high * bits).sort(dim=1).values[:, :2]
    return choice, best[:, -1] - best[:, 0]


def _exactly(costs: Tensor, bits: Sequence[int], budget: int) -> list[int]:
    """The bits of parts with the least sum of costs within a budget."""
    # least[t]: of the parts so far with t bits in all.
    least = torch.full((budget + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0
    choices = []
    for row in costs:
        spent = torch.full((len(bits), budget + 1), torch.inf, dtype=torch.float64)
        for number, width in enumerate(bits):
            spent[number, width:] = least[: max(0, budget + 1 - width)] + row[number]
        least, choice = spent.min(0)
        choices.append(choice)
    total, chosen = int(least.argmin()), []
    for choice in reversed(choices):
        chosen.append(bits[int(choice[total])])
        total -= chosen[-1]
    return chosen[::-1]
