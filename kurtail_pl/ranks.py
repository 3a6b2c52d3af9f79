"""The processes that share a piece of work: who this one is, which windows are its own, and sums over all."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import Tensor
from torch import distributed as dist

PATIENCE = timedelta(days=1000)
"""How long a process waits for the others: the first one may be fusing a large model alone."""


@dataclass(frozen=True)
class Ranks:
    """A process and those it works with; by default it is alone.

    What is asked of all (`sum`, `each`, `gather`, `barrier`) every process must call, in the same order.

    Attributes:
        rank: number of this process.
        size: how many there are.
        group: through which they talk of what is in memory; of what is on devices, through the trainer's own.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def joined(cls) -> Self:
        """The processes that torch.distributed has brought together, if any."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.rank == 0

    @property
    def shared(self) -> str:
        """For log lines: how many share the work; nothing of one alone."""
        return f", shared by {self.size} processes" if self.size > 1 else ""

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of so many things are this process's, or another's: neighbours, and as many as the others' or one more.

        >>> [list(Ranks(rank, 3).share(5)) for rank in range(3)]
        [[0], [1, 2], [3, 4]]
        """
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor of one shape added over all processes, in place; all get the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group if tensor.device.type == "cpu" else None)
        return tensor

    def each(self, number: int) -> list[int]:
        """A number of every process, in the order of their ranks."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        return [int(n) for n in self.sum(numbers)]

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Rows of every process, in the order of their ranks, at the first; nothing at the others.

        Args:
            rows: ``[any number, width]`` in memory, of one width and type everywhere.
        """
        if self.size == 1:
            return [rows]
        counts = self.each(len(rows))
        if not self.leads:
            dist.send(rows.contiguous(), 0, group=self.group)
            return []
        others = [rows.new_empty(count, rows.shape[1]) for count in counts[1:]]
        for source, found in enumerate(others, start=1):
            dist.recv(found, source, group=self.group)
        return [rows, *others]

    def barrier(self) -> None:
        """Wait until all are here."""
        self.each(0)


ALONE = Ranks()
