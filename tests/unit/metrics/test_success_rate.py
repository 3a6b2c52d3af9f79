"""The SuccessRate metric over batches and processes against counting."""

import pytest
import torch
from torch import Tensor

from kurtail_pl.metrics import SuccessRate


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Uneven batches of tokens; the second tensor's maxima grow from batch to batch, and some are equal."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for scale, tokens in ((0.5, 3), (1.0, 40), (2.0, 17)):
        first = torch.randn(tokens, 6, generator=generator)
        second = scale * torch.randn(tokens, 6, generator=generator)
        second[0] = -first[0]
        made.append((first, second))
    return made


def counted(*parts: tuple[Tensor, Tensor]) -> float:
    wins = [
        max(abs(value) for value in a) < max(abs(value) for value in b)
        for first, second in parts
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return sum(wins) / len(wins)


def filled(*parts: tuple[Tensor, Tensor]) -> SuccessRate:
    metric = SuccessRate()
    for part in parts:
        metric.update(*part)
    return metric


def test_batches_are_counted_token_by_token() -> None:
    rate = filled(*pairs()).compute()
    assert rate.dtype == torch.float64
    assert rate.item() == counted(*pairs())
    assert 0.1 < rate < 0.9
    assert rate != torch.tensor([counted(part) for part in pairs()]).mean()


def test_more_dimensions_are_more_tokens() -> None:
    (first, second) = pairs()[1]
    assert filled((first.view(4, 10, 6), second.view(4, 10, 6))).compute().item() == counted((first, second))


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = SuccessRate()
    assert [metric(*part).item() for part in pairs()] == [counted(part) for part in pairs()]
    assert metric.compute().item() == counted(*pairs())


def test_merged_metrics_equal_the_whole() -> None:
    metric = filled(*pairs()[:2])
    metric.merge_state(filled(*pairs()[2:]))
    assert metric.compute().item() == counted(*pairs())


def test_processes_are_added() -> None:
    processes = [filled(*pairs()[:2]), filled(*pairs()[2:])]
    states = {name: [getattr(process, name) for process in processes] for name in ("successes", "tokens")}
    order = iter(states.values())
    processes[0].sync(dist_sync_fn=lambda state, group: next(order), distributed_available=lambda: True)
    assert (processes[0].successes / processes[0].tokens).item() == pytest.approx(counted(*pairs()))


def test_reset_forgets() -> None:
    metric = filled(*pairs())
    metric.reset()
    metric.update(*pairs()[0])
    assert metric.compute().item() == counted(pairs()[0])


def test_nan_before_the_first_update() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert SuccessRate().compute().isnan()
