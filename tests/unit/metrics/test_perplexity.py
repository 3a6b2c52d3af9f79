"""Perplexity against a float64 log-softmax written out, and loosely against torchmetrics' own."""

import math

import pytest
import torch
import torchmetrics.text
from torch import Tensor

from kurtail_pl.errors import NotFinite
from kurtail_pl.metrics import Perplexity

VOCAB = 37


def window(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, tokens, VOCAB, generator=random)
    return logits, torch.randint(VOCAB, (batch, tokens), generator=random)


def expected(*windows: tuple[Tensor, Tensor]) -> float:
    """exp of the mean of log(sum exp logits[t - 1]) - logits[t - 1, token t], all in Python floats."""
    nll: list[float] = []
    for logits, ids in windows:
        for row, tokens in zip(logits.tolist(), ids.tolist(), strict=True):
            for scores, token in zip(row[:-1], tokens[1:], strict=True):
                top = max(scores)
                nll.append(top + math.log(math.fsum(math.exp(s - top) for s in scores)) - scores[token])
    return math.exp(math.fsum(nll) / len(nll))


def filled(*windows: tuple[Tensor, Tensor]) -> Perplexity:
    metric = Perplexity()
    for logits, ids in windows:
        metric.update(logits, ids)
    return metric


WINDOWS = [window(2, 9), window(1, 40, seed=1), window(3, 2, seed=2)]


@pytest.mark.parametrize("tokens", [2, 3, 512, 513, 514, 1026])
def test_one_window_equals_the_definition(tokens: int) -> None:
    result = filled(window(2, tokens)).compute()
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(expected(window(2, tokens)), rel=1e-6)


def test_windows_are_weighted_by_their_tokens() -> None:
    assert filled(*WINDOWS).compute().item() == pytest.approx(expected(*WINDOWS), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    logits, ids = window(2, 30)
    logits = logits.to(dtype)
    assert filled((logits, ids)).compute().item() == pytest.approx(expected((logits, ids)), rel=1e-6)


def test_uniform_logits_give_the_vocabulary() -> None:
    _, ids = window(2, 30)
    assert filled((torch.full((2, 30, VOCAB), 5.0), ids)).compute().item() == pytest.approx(VOCAB, rel=1e-6)


def test_certain_predictions_give_one_and_wrong_ones_stay_finite() -> None:
    _, ids = window(1, 20)
    shifted = ids.roll(-1, dims=1)
    sure = 300 * torch.nn.functional.one_hot(shifted, VOCAB).float()
    assert filled((sure, ids)).compute().item() == pytest.approx(1, abs=1e-6)
    # exp(-300) is no float32: a class that goes through probabilities returns inf here.
    assert filled((-sure, ids)).compute().log().item() == pytest.approx(300 + math.log(VOCAB - 1), rel=1e-6)


def test_last_logits_are_not_scored_and_the_first_token_is_not_predicted() -> None:
    logits, ids = window(2, 12)
    before = filled((logits, ids)).compute()
    logits[:, -1] = 100 * torch.arange(VOCAB)
    ids[:, 0] = (ids[:, 0] + 1) % VOCAB
    assert torch.equal(filled((logits, ids)).compute(), before)


def test_close_to_torchmetrics() -> None:
    other = torchmetrics.text.Perplexity()
    for logits, ids in WINDOWS:
        other.update(logits[:, :-1], ids[:, 1:])
    assert filled(*WINDOWS).compute().item() == pytest.approx(other.compute().item(), rel=1e-4)


def test_merged_metrics_equal_all_windows() -> None:
    first, second = filled(*WINDOWS[:2]), filled(*WINDOWS[2:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(expected(*WINDOWS), rel=1e-6)


def test_processes_are_summed() -> None:
    processes = [filled(one) for one in WINDOWS]
    gathered = {id(processes[0].nll): "nll", id(processes[0].tokens): "tokens"}

    def gather(state: Tensor, group: object) -> list[Tensor]:
        return [getattr(process, gathered[id(state)]) for process in processes]

    processes[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert processes[0].tokens.item() == 16 + 39 + 3
    result = (processes[0].nll / processes[0].tokens).exp().item()
    assert result == pytest.approx(expected(*WINDOWS), rel=1e-6)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = Perplexity()
    for one in WINDOWS:
        assert metric(*one).item() == pytest.approx(expected(one), rel=1e-6)
    assert metric.compute().item() == pytest.approx(expected(*WINDOWS), rel=1e-6)


def test_reset_forgets() -> None:
    metric = filled(*WINDOWS)
    metric.reset()
    metric.update(*WINDOWS[2])
    assert metric.compute().item() == pytest.approx(expected(WINDOWS[2]), rel=1e-6)
    fresh = Perplexity()  # the defaults were not written to either
    fresh.update(*WINDOWS[0])
    assert fresh.compute().item() == pytest.approx(expected(WINDOWS[0]), rel=1e-6)


def test_sizes_that_do_not_match_raise() -> None:
    logits, ids = window(2, 12)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Perplexity().update(logits, ids[:1])
    with pytest.raises(ValueError, match="batch_size"):
        Perplexity().update(logits, ids[:, :-1])


@pytest.mark.parametrize(("logit", "found"), [(float("nan"), "perplexity is nan"), (-1e5, "perplexity is inf")])
def test_no_number_is_no_perplexity(logit: float, found: str) -> None:
    """exp(1e5) is beyond float64, too."""
    logits, ids = torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.int64)
    logits[..., 1] = logit
    metric = Perplexity()
    metric.update(logits, ids)
    with pytest.raises(NotFinite, match=found):
        metric.compute()
