"""One grid for all tokens of a site, the best one for a calibration text: static quantization of activations.

All that the search needs is how often each value comes. Rounded to bfloat16 there are few enough values to count each,
whatever their range: a value far out does not make the bins of the others coarse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Grid, Quantizer, asymmetric_grid, codes_on, symmetric_grid, values_of

BINS = 1 << 16
STEPS_AN_OCTAVE, STEPS = 16, 160
"""Of the search for an end of a grid: from the largest value down to a thousandth of it, in steps of 4 per cent."""
ROUNDS = 3
"""Of the search for two ends, one at a time."""


def count_values(x: Tensor) -> Tensor:
    """How often each value of ``[...]`` comes, rounded to bfloat16: ``[65536]``, int64; counts can be added."""
    bits = x.flatten().to(torch.bfloat16).view(torch.int16)
    return torch.bincount(bits.int() + BINS // 2, minlength=BINS)


def static_grid(counts: Tensor, quantizer: Quantizer) -> Grid:
    """Grid, ``[1]``, with the least mean squared error of the values that were counted.

    A grid that spans all values is a poor one where a few are far out, so its ends are searched: both drawn in together
    and then, with a zero point, each by itself, in turn.

    Args:
        counts: as of `count_values`.
        quantizer: bits and symmetry; the grid ends within its ratio of the extremes.

    Returns:
        Grid of float32; scale 1 where all values are zero.
    """
    seen = counts.nonzero().flatten()
    values, weights = _bin_values(counts.device)[seen], counts[seen].double()
    ratios = quantizer.clip.amount * 2.0 ** -(torch.arange(STEPS, device=counts.device) / STEPS_AN_OCTAVE)

    def best(grids: Grid) -> Tensor:
        error = values_of(codes_on(values, grids, quantizer), grids).sub_(values).square_()
        return (error.double() @ weights).argmin(0, keepdim=True)

    if quantizer.symmetric:
        grids = symmetric_grid(values.abs().amax() * ratios, quantizer.bits)
        return Grid(grids.scale[best(grids)], None)
    lows, highs = values.amin() * ratios, values.amax() * ratios
    chosen = best(asymmetric_grid(lows, highs, quantizer.bits))
    low, high = lows[chosen], highs[chosen]
    for _ in range(ROUNDS):
        high = highs[best(asymmetric_grid(low.expand_as(highs), highs, quantizer.bits))]
        low = lows[best(asymmetric_grid(lows, high.expand_as(lows), quantizer.bits))]
    return asymmetric_grid(low, high, quantizer.bits)


def _bin_values(device: torch.device) -> Tensor:
    """The value that each bin counts, ``[65536]``, float32; those that are no numbers come with no count."""
    bits = torch.arange(-BINS // 2, BINS // 2, device=device).to(torch.int16)
    return bits.view(torch.bfloat16).float()
