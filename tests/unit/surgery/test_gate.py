"""The gate: who is to blame when values are no numbers."""

import math

import pytest
import torch

from kurtail_pl.errors import GateError, NotFinite
from kurtail_pl.surgery.gate import check


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_fold_is_not_to_blame_for_an_original_that_is_no_number(value: float) -> None:
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, value, 1.0], [1.0, 1.0, 1.0]])
    with pytest.raises(NotFinite, match=r"the original model's output .* before folding"):
        check("folding", bad, bad, 1e-8)
    with pytest.raises(GateError, match="folding changed the output"):
        check("folding", good, bad, 1e-8)
    assert check("folding", good, good, 1e-8) == 0
