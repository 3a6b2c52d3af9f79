"""A loader of contiguous blocks of the activation store that resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kurtail_pl.storage.activations import ActivationStore, block_sites, value_sites

Batch = dict[str, Tensor]


class BlockLoader:
    """`steps` batches of `batch_rows` rows from every site; each a pure function of the seed and the step.

    The rows ``[first_row, last_row)`` are cut into blocks, the last one perhaps shorter; an epoch takes every block
    once, in an order drawn from the seed. A plain DataLoader starts over at batch 0 when training resumes; this one
    carries on, through the `state_dict` that Lightning saves with the checkpoint.

    A batch is ``{"residual": [2 layers, rows, hidden], "value": [layers, rows, kv_heads, head_dim]}``, float32. Of
    several processes each takes its `share`, (rank, world size), of every batch: contiguous rows, equally many.
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
        self._store, self._batch_rows, self._steps, self._seed = store, batch_rows, steps, seed
        self._first_row, self._last_row, self._share = first_row, last_row, share
        self._blocks = -(-(last_row - first_row) // batch_rows)
        self._next_step = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        start, self._next_step = self._next_step % self._steps, 0
        for step in range(start, self._steps):
            batch = self.batch(step)
            self._next_step = step + 1
            yield batch

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        epoch, position = divmod(step, self._blocks)
        order = torch.randperm(self._blocks, generator=torch.Generator().manual_seed(self._seed + epoch))
        start = self._first_row + int(order[position]) * self._batch_rows
        rank, world_size = self._share
        rows = (min(start + self._batch_rows, self._last_row) - start) // world_size
        return read_batch(self._store, start + rank * rows, start + (rank + 1) * rows)

    def state_dict(self) -> dict[str, int]:
        """The step that comes next."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass at the saved step."""
        self._next_step = state["next_step"]


def read_batch(store: ActivationStore, start: int, stop: int) -> Batch:
    """Rows ``[start, stop)`` of every site."""
    shape = store.shape
    residual = torch.stack([store.read(site, start, stop) for site in block_sites(shape.layers)])
    value = torch.stack([store.read(site, start, stop) for site in value_sites(shape.layers)])
    return {"residual": residual, "value": value.view(shape.layers, stop - start, shape.kv_heads, shape.head_dim)}
