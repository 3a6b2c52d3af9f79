"""The quantizer of what learns: its values against the plain one's, its gradients against formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.clip import Clip, LearnedClip
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.maths.trained_quantizer import TrainedQuantizer


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [0.6, 1.0])
def test_its_values_are_the_plain_ones_bit_for_bit(
    dtype: torch.dtype, group_size: int | None, symmetric: bool, clip: float
) -> None:
    settings = (4, symmetric, Clip(amount=clip), group_size)
    x = values(dtype)
    assert torch.equal(fake_quantize(x, TrainedQuantizer(*settings)), fake_quantize(x, Quantizer(*settings)))


def test_the_gradient_knows_that_the_range_is_a_value_s() -> None:
    """Of ``s round(x / s)``, s the largest over 7, with the rounding passed straight through: worked out by hand."""
    x = values(torch.float64)[0].requires_grad_()
    seen = torch.linspace(-1, 1, 24, dtype=torch.float64)
    (fake_quantize(x, TrainedQuantizer(4, True, Clip())) * seen).sum().backward()  # type: ignore[no-untyped-call]
    plain, out = x.detach().numpy(), seen.numpy()
    largest = np.abs(plain).argmax()
    scale = abs(plain[largest]) / 7
    expected = out.copy()
    expected[largest] += np.sign(plain[largest]) / 7 * (out * (np.round(plain / scale) - plain / scale)).sum()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_what_is_clipped_has_no_gradient_but_the_clip_has() -> None:
    x = torch.tensor([[-8.0, 3.9, 0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fake_quantize(x, TrainedQuantizer(4, True, LearnedClip(amount=ratio)))[0, 0].backward()  # type: ignore[no-untyped-call]
    # It stands at code -8 of a scale of 8 ratio / 7.
    assert ratio.grad is not None
    assert ratio.grad.item() == pytest.approx(-8 * 8 / 7)
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([8 * 0.5 / 7, 0, 0, 0])  # Through the range alone.
