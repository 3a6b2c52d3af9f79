"""The Kurtosis metric over batches and processes against SciPy on the concatenated values."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kurtail_pl.metrics import Kurtosis


def values(*shape: int, seed: int = 0) -> Tensor:
    """Skewed, heavy-tailed float64 values with a large mean of its own for each site."""
    random = torch.Generator().manual_seed(seed)
    offset = 100 * torch.arange(shape[0], dtype=torch.float64).reshape(-1, *(1 for _ in shape[1:]))
    return torch.randn(*shape, generator=random, dtype=torch.float64).exp() + offset


def expected(*batches: Tensor) -> Tensor:
    whole = torch.cat([batch.double().flatten(1) for batch in batches], dim=1)
    return torch.from_numpy(np.asarray(scipy.stats.kurtosis(whole.numpy(), axis=1, fisher=False, bias=True)))


def batches() -> list[Tensor]:
    """Uneven batches of 3 sites whose distributions differ."""
    shapes = [(3, 4, 10), (3, 1, 10), (3, 9, 10), (3, 200, 10)]
    return [(1 + i) * values(*shape, seed=i) for i, shape in enumerate(shapes)]


def filled(*parts: Tensor) -> Kurtosis:
    metric = Kurtosis(3)
    for part in parts:
        metric.update(part)
    return metric


def test_batches_equal_the_concatenation() -> None:
    result = filled(*batches()).compute()
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected(*batches()), rtol=1e-9, atol=0)
    torch.testing.assert_close(filled(*batches()[::-1]).compute(), expected(*batches()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_values_are_added_in_float64(dtype: torch.dtype) -> None:
    parts = [batch.to(dtype) for batch in batches()]
    torch.testing.assert_close(filled(*parts).compute(), expected(*parts), rtol=1e-9, atol=0)


def test_values_of_one_dimension_beside_the_sites() -> None:
    torch.testing.assert_close(filled(values(3, 40)).compute(), expected(values(3, 40)), rtol=1e-9, atol=0)


def test_merged_metrics_equal_the_concatenation() -> None:
    first, second = filled(*batches()[:3]), filled(*batches()[3:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), expected(*batches()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 2], [4], [3, 0, 1], [0, 4]])
def test_processes_are_merged_by_their_moments(counts: list[int]) -> None:
    # What every process gathers: the states of all, one of them perhaps with no batch yet.
    parts = iter(batches())
    processes = [filled(*(next(parts) for _ in range(count))) for count in counts]
    gathered = [process.moments for process in processes]
    processes[0].sync(dist_sync_fn=lambda state, group: gathered, distributed_available=lambda: True)
    merged = processes[0].moments
    torch.testing.assert_close(merged[0], torch.full((3,), 2140.0).double())
    m2, m4 = merged[2], merged[4]
    torch.testing.assert_close(merged[0] * m4 / m2**2, expected(*batches()), rtol=1e-9, atol=0)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = Kurtosis(3)
    for batch in batches():
        torch.testing.assert_close(metric(batch), expected(batch), rtol=1e-9, atol=0)
    torch.testing.assert_close(metric.compute(), expected(*batches()), rtol=1e-9, atol=0)


def test_reset_forgets() -> None:
    metric = filled(*batches())
    metric.reset()
    metric.update(batches()[0])
    torch.testing.assert_close(metric.compute(), expected(batches()[0]), rtol=1e-9, atol=0)


def test_a_batch_without_values_changes_nothing() -> None:
    result = filled(batches()[0], torch.empty(3, 0, 10), batches()[1]).compute()
    torch.testing.assert_close(result, expected(*batches()[:2]), rtol=1e-9, atol=0)


def test_nan_before_the_first_update() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert Kurtosis(3).compute().isnan().all()


def test_state_survives_the_module_changing_its_dtype() -> None:
    module = torch.nn.ModuleList([Kurtosis(3)]).half()
    metric = module[0]
    assert isinstance(metric, Kurtosis)
    metric.update(batches()[3])
    assert metric.moments.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), expected(batches()[3]), rtol=1e-9, atol=0)
