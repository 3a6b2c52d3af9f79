"""The resumable loader against the rows that were put into the store."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from kurtail_pl.lit.loader import BlockLoader

BLOCKS = 8


def loader_of(known: Any, **changes: int) -> BlockLoader:
    """Two epochs of eight blocks of seven rows, from row 20 on."""
    settings = {"batch_rows": 7, "steps": 16, "seed": 3, "first_row": 20, "last_row": 76, **changes}
    return BlockLoader(known.store, **settings)


def row_numbers(batch: dict[str, Tensor]) -> list[int]:
    """The rows of a batch, which every site must agree on."""
    numbers = torch.cat([batch["residual"][..., 0], batch["value"][..., 0, 0]])
    assert (numbers == numbers[0]).all()
    return [int(32 * number) for number in numbers[0]]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in ("residual", "value"))


def test_a_batch_is_a_block_of_every_site_in_the_models_order(known: Any) -> None:
    for batch in loader_of(known):
        rows = row_numbers(batch)
        assert batch["residual"].shape == (6, 7, 16)
        assert batch["value"].shape == (3, 7, 2, 4)
        assert batch["residual"].dtype == batch["value"].dtype == torch.bfloat16
        assert rows == list(range(rows[0], rows[0] + 7))
        assert torch.equal(batch["residual"].float(), known.residual[:, rows])
        assert torch.equal(batch["value"].float(), known.value[:, rows])


def test_each_epoch_covers_every_block_once_in_an_order_of_its_own(known: Any) -> None:
    seen = [row_numbers(batch) for batch in loader_of(known)]
    assert len(seen) == len(loader_of(known)) == 2 * BLOCKS
    first, second = seen[:BLOCKS], seen[BLOCKS:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20, 76))
    assert first != second
    assert first != sorted(first)


def test_a_batch_depends_on_seed_and_step_alone(known: Any) -> None:
    in_order = list(loader_of(known))
    torch.rand(1)  # the global generator plays no part
    asked = loader_of(known)
    for step in (13, 2, 15, 0):
        assert same(asked.batch(step), in_order[step])
    assert all(map(same, in_order, loader_of(known, steps=9)))
    reseeded = [row_numbers(batch) for batch in loader_of(known, seed=4)]
    assert reseeded != [row_numbers(batch) for batch in in_order]


def test_iterating_again_starts_over(known: Any) -> None:
    loader = loader_of(known)
    assert all(map(same, list(loader), list(loader)))


@pytest.mark.parametrize("stopped_after", [1, 7, 8, 15])
def test_resumes_after_the_step_it_stopped_at(known: Any, stopped_after: int) -> None:
    whole, stopped = list(loader_of(known)), loader_of(known)
    batches = iter(stopped)
    for _ in range(stopped_after):
        next(batches)
    resumed = loader_of(known)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == 16 - stopped_after
    assert all(map(same, rest, whole[stopped_after:]))
    assert len(list(resumed)) == 16  # the pass after it is a whole one


def test_a_state_after_the_last_step_starts_a_new_pass(known: Any) -> None:
    finished, resumed = loader_of(known), loader_of(known)
    whole = list(finished)
    resumed.load_state_dict(finished.state_dict())
    assert all(map(same, list(resumed), whole))


def test_state_is_plain_and_a_copy(known: Any) -> None:
    loader = loader_of(known)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    next(batches)
    assert [type(value) for value in state.values()] == [int]
    assert state != loader.state_dict()
