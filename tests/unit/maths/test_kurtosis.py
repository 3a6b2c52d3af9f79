"""Kurtosis, moments and the KurTail loss against SciPy, closed forms and finite differences."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.maths.kurtosis import Moments, kurtail_loss, kurtosis, kurtosis_of, merge_moments, moments, rms_norm


def samples(*shape: int, seed: int = 0) -> Tensor:
    """Skewed, heavy-tailed float64 values: no odd moment vanishes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def scipy_kurtosis(values: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(scipy.stats.kurtosis(values.double().numpy(), axis=-1, fisher=False, bias=True)))


def moments_by_definition(values: Tensor) -> Moments:
    array = values.numpy().astype(np.longdouble)
    deviation = array - array.mean(-1, keepdims=True)
    sums = [(deviation**power).sum(-1).astype(np.float64) for power in (2, 3, 4)]
    count = np.full(array.shape[:-1], float(array.shape[-1]))
    return Moments(*(torch.from_numpy(np.asarray(m)) for m in (count, array.mean(-1).astype(np.float64), *sums)))


def merged(parts: list[Tensor]) -> Moments:
    total = moments(parts[0])
    for part in parts[1:]:
        total = merge_moments(total, moments(part))
    return total


@pytest.mark.parametrize("shape", [(50,), (3, 200), (2, 3, 77)])
@pytest.mark.parametrize("offset", [0.0, -3.5])
def test_kurtosis_equals_scipy(shape: tuple[int, ...], offset: float) -> None:
    values = samples(*shape) + offset
    expected = scipy_kurtosis(values)
    torch.testing.assert_close(kurtosis(values), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kurtosis_of(moments(values)), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kurtosis(values.float()), expected.float(), rtol=1e-5, atol=0)


def test_uniform_grid() -> None:
    n = 101
    expected = 1.8 - 12 / (5 * (n**2 - 1))  # of the discrete uniform distribution; 1.8 in the limit
    assert kurtosis(torch.arange(n).double()).item() == pytest.approx(expected, rel=1e-12)
    assert kurtosis(torch.linspace(-1, 1, 100_001)).item() == pytest.approx(1.8, rel=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.25, 0.1])
def test_two_points(p: float) -> None:
    # Bernoulli: 3 + (1 - 6 p (1 - p)) / (p (1 - p)), which is 1 for equal halves.
    values = (torch.arange(100) < 100 * p).double() * 4 - 1
    assert kurtosis(values).item() == pytest.approx(3 + (1 - 6 * p * (1 - p)) / (p * (1 - p)), rel=1e-12)


def test_normal_quantiles() -> None:
    quantiles = scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    assert kurtosis(torch.from_numpy(quantiles)).item() == pytest.approx(3, rel=1e-3)


def test_shift_and_scale_change_nothing() -> None:
    values = samples(4, 100)
    torch.testing.assert_close(kurtosis(-3 * values + 50), scipy_kurtosis(values), rtol=1e-9, atol=0)


def test_gradient_agrees_with_finite_differences() -> None:
    values = samples(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(kurtosis, (values,))
    assert torch.autograd.gradcheck(kurtail_loss, (samples(2, 3, 4).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    values = (samples(3, 4000) + 2).to(dtype)
    result = kurtosis(values)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, scipy_kurtosis(values).float(), rtol=1e-4, atol=0)


def test_float64_stays_float64() -> None:
    assert kurtosis(samples(2, 9)).dtype == torch.float64


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_meet_their_definition(offset: float) -> None:
    values = samples(3, 500) + offset
    for got, expected in zip(moments(values), moments_by_definition(values), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == (3,)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sizes", [[300, 300], [1, 599], [599, 1], [7, 250, 43, 300], [1] * 20 + [580]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_moments_equal_those_of_the_whole(sizes: list[int], offset: float) -> None:
    values = samples(2, 600) + offset
    whole = moments_by_definition(values)
    parts = list(torch.split(values, sizes, dim=-1))
    for order in (parts, parts[::-1]):
        for got, expected in zip(merged(order), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(kurtosis_of(merged(parts)), scipy_kurtosis(values), rtol=1e-9, atol=0)


def test_merging_is_associative_with_means_far_apart() -> None:
    a, b, c = samples(2, 40), samples(2, 90, seed=1) + 1e3, -samples(2, 5, seed=2) - 1e3
    whole = moments_by_definition(torch.cat([a, b, c], -1))
    left = merge_moments(merge_moments(moments(a), moments(b)), moments(c))
    right = merge_moments(moments(a), merge_moments(moments(b), moments(c)))
    for first, second, expected in zip(left, right, whole, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(second, expected, rtol=1e-9, atol=0)


def test_merging_with_zero_moments_changes_nothing() -> None:
    some = moments(samples(3, 30) + 7)
    nothing = Moments(*torch.zeros(5, 3, dtype=torch.float64))
    for result in (merge_moments(some, nothing), merge_moments(nothing, some)):
        assert torch.equal(torch.stack(result), torch.stack(some))
    assert torch.equal(torch.stack(merge_moments(nothing, nothing)), torch.zeros(5, 3, dtype=torch.float64))


def test_merging_with_the_moments_of_an_empty_tensor_changes_nothing() -> None:
    some, nothing = moments(samples(3, 30) + 7), moments(torch.empty(3, 0))
    for result in (merge_moments(some, nothing), merge_moments(nothing, some)):
        assert torch.equal(torch.stack(result), torch.stack(some))


def test_equal_values_have_no_kurtosis() -> None:
    assert kurtosis_of(moments(torch.full((2, 8), 3.0))).isnan().all()


def test_kurtail_loss_is_one_distance_per_site() -> None:
    heavy, flat = samples(5, 40), torch.arange(200.0, dtype=torch.float64).reshape(5, 40)
    two_points = (flat % 2) * 2 - 1
    loss = kurtail_loss(torch.stack([heavy, flat, two_points]))
    # Pooled over tokens and channels; below 1.8 (two points: 1) the distance is positive too.
    expected = torch.stack([scipy_kurtosis(heavy.flatten()) - 1.8, 1.8 - scipy_kurtosis(flat.flatten())]).tolist()
    assert loss.tolist() == pytest.approx([*expected, 0.8], rel=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_equals_torch(eps: float, dtype: torch.dtype) -> None:
    x = samples(2, 5, 48).to(dtype)
    torch.testing.assert_close(rms_norm(x, eps), torch.nn.functional.rms_norm(x, (48,), eps=eps))
    assert torch.equal(rms_norm(torch.zeros(2, 8), eps), torch.zeros(2, 8))
