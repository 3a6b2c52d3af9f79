"""Static grids of inputs with massive tokens among them."""

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.ranks import ALONE
from kurtail_pl.stages.quantization.calibration import fix_grid
from kurtail_pl.surgery.linear import QuantizedLinear


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_grid_is_not_made_for_massive_tokens(symmetric: bool) -> None:
    """One token in 64, a thousand times as large, changes nothing; a few values of the others do."""
    quantizer = Quantizer(4, symmetric)
    linear = QuantizedLinear(torch.nn.Linear(48, 8), None, quantizer)
    x = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))

    def scale_of(x: Tensor) -> float:
        fix_grid([linear], [window[None] for window in x], quantizer, ALONE, torch.device("cpu"))
        assert linear.input_scale is not None
        return linear.input_scale.item()

    massive, wide = x.clone(), x.clone()
    massive[:, 0] *= 1000
    wide[:, :, 0] *= 4
    assert scale_of(massive) == pytest.approx(scale_of(x), rel=0.02)
    assert scale_of(wide) > 1.2 * scale_of(x)
