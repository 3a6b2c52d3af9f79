"""Factors that learn: the inverse that is given beside them, against numpy's, wherever training takes them."""

import numpy as np
import pytest
import torch

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.surgery.trained_maps import Factor


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("n", [2, 9, 16])
def test_the_inverse_stands_beside_the_matrix(n: int, orthogonal: bool) -> None:
    """At the start, which is the matrix that was given, and after steps far larger than any of the training."""
    start = random_hadamard(n, torch.Generator().manual_seed(n))
    factor = Factor(start, orthogonal)
    np.testing.assert_allclose(factor()[0].detach().numpy(), start.numpy(), atol=1e-14)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in factor.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    matrix, back = (found.detach().numpy() for found in factor())
    assert np.abs(matrix - start.numpy()).max() > 0.1
    np.testing.assert_allclose(back, np.linalg.inv(matrix).T, rtol=1e-9, atol=1e-9)
    spread = np.linalg.svd(matrix)[1]
    assert (spread.max() / spread.min() < 1 + 1e-9) == orthogonal


def test_all_of_it_learns() -> None:
    """Gradients of every parameter are those of finite differences."""
    factor = Factor(random_hadamard(4, torch.Generator().manual_seed(0)), orthogonal=False)
    seen = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in factor.parameters():
        (torch.stack(factor()) * seen).sum().backward()  # type: ignore[no-untyped-call]
        assert parameter.grad is not None
        gradient, numbers = parameter.grad.clone(), parameter.detach().view(-1)
        factor.zero_grad()
        for place in range(len(numbers)):
            ends = []
            for step in (1e-6, -2e-6):
                numbers[place] += step
                ends.append((torch.stack(factor()) * seen).sum().item())
            numbers[place] += 1e-6
            assert gradient.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)
