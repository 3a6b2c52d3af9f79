"""The rounded head in torch, as ONNX Runtime's MatMulNBits computes it at accuracy level 4.

Its kernels for AVX2, AVX-512 and NEON round inputs alike (`QuantizeARow_CompInt8` in `onnxruntime/core/mlas/lib`):
blocks as long as the weight's, each on the scale ``max |x| / 127``, half to even, no zero point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from kurtail_onnx.graph.head import ROUNDED, ROWS
from kurtail_onnx.settings import Head
from kurtail_pl.maths.quantizers import fake_quantize


class HeadAgreement(NamedTuple):
    """How far the logits of two heads are apart on equal hidden states, relative to the largest logit.

    Attributes:
        error: the largest difference.
        step: what one input moves a logit by at most when it lies on the border of two codes; 0 for a float head.
    """

    error: float
    step: float


class RoundedHead(nn.Module):
    """Logits of rounded hidden states and a rounded weight ``[vocabulary, hidden]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.values = torch.empty(weight.shape)
        for ours, rows in zip(torch.split(self.values, ROWS), torch.split(weight, ROWS), strict=True):
            ours.copy_(fake_quantize(rows.float(), ROUNDED))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., vocabulary]``."""
        return linear(fake_quantize(x.float(), ROUNDED), self.values)

    def step(self, x: Tensor) -> float:
        """The most that one input on a border moves a logit by, in any token of x."""
        ends = torch.aminmax(self.values)
        return float(x.abs().max() / ROUNDED.code_range[1] * torch.maximum(-ends.min, ends.max))


def mirrored(head: nn.Linear, form: Head) -> nn.Module:
    """A head of the artefact as the export has it."""
    return RoundedHead(head.weight.detach()) if form == "int8" else head


@torch.no_grad()
def compare_heads(head: nn.Module, states: Tensor, logits: NDArray[np.generic], divisor: float = 1.0) -> HeadAgreement:
    """An export's logits beside those of a head of the same normed hidden states ``[..., hidden]``, over a divisor."""
    expected = head(states).numpy() / divisor
    largest = float(np.abs(expected).max())
    step = head.step(states) / divisor if isinstance(head, RoundedHead) else 0.0
    return HeadAgreement(float(np.abs(expected - logits).max()) / largest, step / largest)
