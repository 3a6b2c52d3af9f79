"""Hessians of wide inputs, which are summed block by block, against float64."""

import pytest
import torch

from kurtail_pl.stages.quantization import moments
from kurtail_pl.stages.quantization.moments import moments_of
from kurtail_pl.surgery.linear import QuantizedLinear


@pytest.mark.parametrize("width", [40, 256, 300, 700])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("widest_in_double", [8192, 16])
def test_blocks_make_the_whole_symmetric_product(
    width: int, counted: bool, widest_in_double: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "FLOAT64_WIDTH", widest_in_double)
    draw = torch.Generator().manual_seed(0)
    windows = [torch.randn(1, 50, width, generator=draw) for _ in range(3)]
    exact = [torch.randn(1, 50, width, generator=draw) for _ in range(3)]
    counts = [torch.rand(50, generator=draw) for _ in range(3)] if counted else None
    linear = QuantizedLinear(torch.nn.Linear(width, 4), None, None)
    found = moments_of(linear, windows, exact, counts, True, torch.device("cpu"))
    x, y = (torch.cat(each, 1)[0].double() for each in (windows, exact))
    weights = torch.cat(counts).double()[:, None] if counts else torch.ones(150, 1).double()
    assert found.hessian is not None
    assert found.cross is not None
    # Fifty products of numbers of order one in float32, three times.
    torch.testing.assert_close(found.hessian.double(), x.T @ (weights * x), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), y.T @ (weights * x), rtol=0, atol=1e-4)
    off = found.hessian - found.hessian.T
    assert off.abs().max() < 1e-5
    assert found.hessian.dtype == (torch.float64 if width <= widest_in_double else torch.float32)
