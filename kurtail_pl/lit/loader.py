"""Loaders that resume where they stopped: blocks of the activation store, and windows of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kurtail_pl.storage.activations import ActivationStore, block_sites, value_sites

Batch = dict[str, Tensor]
T = TypeVar("T")


class StepLoader(ABC, Generic[T]):
    """`steps` batches, each a pure function of its step; the next one is read while one is learned from.

    A plain DataLoader starts over at batch 0 when training resumes; this one carries on, through the `state_dict` that
    Lightning saves with the checkpoint.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._next_step = 0

    @abstractmethod
    def batch(self, step: int) -> T:
        """The batch of one step."""

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[T]:
        start, self._next_step = self._next_step % self._steps, 0
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self.batch, start)
            for step in range(start, self._steps):
                batch = coming.result()
                if step + 1 < self._steps:
                    coming = reader.submit(self.batch, step + 1)
                self._next_step = step + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The step that comes next."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass at the saved step."""
        self._next_step = state["next_step"]


def block_of(step: int, blocks: int, seed: int) -> int:
    """Which block a step takes: every epoch takes each once, in an order drawn from the seed and the epoch."""
    epoch, position = divmod(step, blocks)
    return int(torch.randperm(blocks, generator=torch.Generator().manual_seed(seed + epoch))[position])


class BlockLoader(StepLoader[Batch]):
    """Batches of `batch_rows` contiguous rows from every site.

    The rows ``[first_row, last_row)`` are cut into blocks, the last one perhaps shorter.

    A batch is ``{"residual": [2 layers, rows, hidden], "value": [layers, rows, kv_heads, head_dim]}`` in bfloat16, as
    the store has them: the device makes float32 of them, which are half as many bytes on the way. Of several processes
    each takes its `share`, (rank, world size), of every batch: contiguous rows, equally many.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_rows: int,
        steps: int,
        seed: int,
        first_row: int,
        last_row: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(steps)
        self._store, self._batch_rows, self._seed = store, batch_rows, seed
        self._first_row, self._last_row, self._share = first_row, last_row, share
        self._blocks = -(-(last_row - first_row) // batch_rows)

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        start = self._first_row + block_of(step, self._blocks, self._seed) * self._batch_rows
        rank, world_size = self._share
        rows = (min(start + self._batch_rows, self._last_row) - start) // world_size
        return read_batch(self._store, start + rank * rows, start + (rank + 1) * rows)


class WindowLoader(StepLoader[Tensor]):
    """Batches of windows of tokens, ``[batch_windows, seqlen]``; each process takes its `share` as in `BlockLoader`."""

    def __init__(
        self, windows: Tensor, batch_windows: int, steps: int, seed: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(steps)
        self._batches = windows.view(-1, batch_windows, windows.shape[-1])
        self._seed, self._share = seed, share

    def batch(self, step: int) -> Tensor:
        """The batch of one step."""
        rank, world_size = self._share
        return self._batches[block_of(step, len(self._batches), self._seed)].chunk(world_size)[rank]


def read_batch(store: ActivationStore, start: int, stop: int) -> Batch:
    """Rows ``[start, stop)`` of every site, bfloat16."""
    shape = store.shape
    residual = torch.stack([store.stored(site, start, stop) for site in block_sites(shape.layers)])
    value = torch.stack([store.stored(site, start, stop) for site in value_sites(shape.layers)])
    return {"residual": residual, "value": value.view(shape.layers, stop - start, shape.kv_heads, shape.head_dim)}
