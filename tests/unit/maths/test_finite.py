"""Values that are no numbers, wherever they are, and what float16 holds, by its own smallest and largest numbers."""

import pytest
import torch

from kurtail_pl.maths.finite import half_or_float, is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    if dtype == torch.float8_e4m3fn and value == value:  # It has no infinity.
        return
    x = torch.randn(67, generator=torch.Generator().manual_seed(0)).to(dtype)  # Longer than a vector register.
    assert is_finite(x)
    for place in range(len(x)):
        bad = x.clone()
        bad[place] = value
        assert not is_finite(bad)


def test_codes_and_nothing_at_all_are_finite() -> None:
    assert is_finite(torch.tensor([255], dtype=torch.uint8))
    assert is_finite(torch.empty(0, 3))


@pytest.mark.parametrize("largest", [65504.0, -65504.0])
def test_float16_holds_up_to_its_largest_number(largest: float) -> None:
    x = torch.tensor([largest, 1.0])
    assert half_or_float(x).dtype == torch.float16
    # The next float16 would be 65536: from half the way on values round to infinity.
    assert torch.equal(half_or_float(x * (65520 / 65504)), x * (65520 / 65504))
    assert half_or_float(x * (65520 / 65504)).dtype == torch.float32


def test_the_loss_of_small_values_is_at_most_bfloat16s() -> None:
    """Below 2^-14 float16 numbers are 2^-24 apart; rounding takes up to half of that, root mean square 2^-24/12^.5."""
    x = 1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = (7 / 3) ** 0.5  # Of values uniform in [1, 2).
    border = 2.0**-24 / 12**0.5 / norm * 2**9
    assert half_or_float(x * border * 1.02).dtype == torch.float16
    kept = half_or_float(x * border / 1.02)
    assert torch.equal(kept, (x * border / 1.02).float())
    assert half_or_float(x * 1e-12).dtype == torch.float32


def test_a_few_small_values_among_large_ones_and_zeros_change_nothing() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    x[7] *= 1e-30  # A token that training has never seen.
    assert torch.equal(half_or_float(x), x.half())
    assert torch.equal(half_or_float(torch.zeros(5)), torch.zeros(5).half())
