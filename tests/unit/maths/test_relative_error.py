"""Errors of a rounded weight against outputs that are made one after another."""

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.relative_error import relative_errors


def drawn(out: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13)
    return weight, weight + 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64), inputs


@pytest.mark.parametrize(("out", "channels"), [(5, range(5)), (32, range(32)), (70, range(0, 70, 3))])
def test_the_error_of_the_output_is_that_of_every_token(out: int, channels: range) -> None:
    """Of 70 channels each third is looked at: every second would be more than 32."""
    weight, rounded, inputs = drawn(out)
    lost = whole = 0.0
    for x in inputs:
        for row in channels:
            lost += ((weight[row] - rounded[row]) @ x).item() ** 2
            whole += (weight[row] @ x).item() ** 2
    found = relative_errors(weight, rounded.clone(), inputs.T @ inputs)
    assert found["output"] == pytest.approx(lost / whole, rel=1e-4)
    entries = [(a - b) ** 2 for a, b in zip(weight.flatten().tolist(), rounded.flatten().tolist(), strict=True)]
    assert found["weight"] == pytest.approx(sum(entries) / sum(a**2 for a in weight.flatten().tolist()), rel=1e-4)


def test_without_inputs_the_weight_alone_is_measured() -> None:
    weight, rounded, _ = drawn(5)
    assert list(relative_errors(weight, rounded, None)) == ["weight"]


def test_of_nothing_nothing_is_lost_and_what_is_no_number_is_left_out() -> None:
    nothing = torch.zeros(3, 4)
    assert relative_errors(nothing, nothing.clone(), torch.eye(4)) == {"weight": 0.0, "output": 0.0}
    assert relative_errors(torch.ones(3, 4), torch.full((3, 4), float("inf")), None) == {}
