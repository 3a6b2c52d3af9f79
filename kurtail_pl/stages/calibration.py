"""What the quantizers of a layer's inputs and keys take from calibration windows: centres, and static grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kurtail_pl.maths.massive import is_massive
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.maths.static_grid import BINS, count_values, static_grid
from kurtail_pl.ranks import Ranks
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import subtract_from_keys
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import head_dim_of

FLOAT_DTYPE = torch.float16
"""Of what an artefact keeps unquantized, scales apart: rotated weights are small, and float16 rounds them eight times
finer than bfloat16."""


def sum_inputs(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """Sum of a linear's inputs ``[..., in]`` over the tokens that are not massive, and their number: ``[in + 1]``."""
    rows = linear.turn(x).flatten(0, -2)
    rows = rows[~is_massive(rows)].double()
    return torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])


def centre_inputs(readers: Iterable[QuantizedLinear], total: Tensor) -> None:
    """Let linears that read the same inputs subtract the mean of these, given `sum_inputs` of all."""
    for linear in readers:
        # As it will be stored: the bias then makes up for just what is subtracted.
        linear.subtract((total[:-1] / total[-1].clamp(min=1)).to(FLOAT_DTYPE))


class KeyMean:
    """The mean of a layer's rotated keys over the tokens of windows of one length."""

    def __init__(self, walker: Walker) -> None:
        config, self.dtype = walker.model.config, walker.dtype
        self.total = torch.zeros(config.num_key_value_heads, 1, head_dim_of(config), dtype=torch.float64)
        self.total, self.windows = self.total.to(walker.device), 0

    def add(self, keys: Tensor) -> None:
        """Keys of one window, ``[1, kv_heads, tokens, head_dim]``."""
        self.total += keys[0].double().mean(1, keepdim=True)
        self.windows += 1

    def subtract(self, attention: nn.Module, ranks: Ranks) -> None:
        """Let the attention subtract the mean over the windows of all processes."""
        mean = ranks.sum(self.total) / sum(ranks.each(self.windows))
        subtract_from_keys(attention, mean.to(FLOAT_DTYPE).to(self.dtype))


def fix_grid(
    readers: Sequence[QuantizedLinear],
    inputs: Iterable[Tensor],
    quantizer: Quantizer,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Let linears quantize all inputs on the one grid that is best for the tokens that are not massive.

    A grid that holds the massive ones too is too coarse for all others.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=device)
    for x in inputs:
        rows = readers[0].turn(x).flatten(0, -2)
        counts += count_values(rows[~is_massive(rows)])
    grid = static_grid(ranks.sum(counts), quantizer)
    for linear in readers:
        linear.fix_grid(grid)
