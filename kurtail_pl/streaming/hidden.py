"""Hidden states of many windows in memory-mapped files: in memory while there is room, on disk when there is not.

The files outlive a killed process, so that the work can be taken up after the last finished layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kurtail_pl.errors import NotFinite
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.storage.files import claim
from kurtail_pl.storage.resume import Workplace
from kurtail_pl.storage.transfer import Staging

CPU = torch.device("cpu")


class MappedStates:
    """States of every window, each ``[1, tokens, width]``, in one memory-mapped file.

    Args:
        path: the file; its states are kept when it exists in the right size.
        shape: windows, tokens and width.
        dtype: of the states.
        device: where the states of a window are put when they are asked for; the file is the CPU's.
        place: says where in the model the states are that are being written.

    Raises:
        OSError: when the disk has no room (the whole file is claimed at once: a full disk would otherwise kill the
            process later, on a write to memory).
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device = CPU,
        place: Callable[[], str] = lambda: "the model",
    ) -> None:
        self._count, self._device, self._place = shape[0], device, place
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        if size == 0:
            return
        if not path.is_file() or path.stat().st_size != size:
            with path.open("wb") as file:
                claim(file, size)
        values = size // dtype.itemsize
        self._states = torch.from_file(str(path), shared=True, size=values, dtype=dtype).view(shape)
        self._staging = Staging(shape[1:], dtype, device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, window: int) -> Tensor:
        states = self._states[window]
        return (states.to(self._device) if self._staging is None else self._staging.to_device(states)).unsqueeze(0)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[window] for window in range(len(self)))

    def __setitem__(self, window: int, states: Tensor) -> None:
        """Write the states of a window; raises NotFinite when a value is infinite or not a number."""
        state = states[0].to(self._states.dtype)
        if self._staging is None:
            self._states[window] = state
        else:
            self._staging.from_device(state, self._states[window])
        if not is_finite(state):  # On the device, where a look takes less time.
            raise NotFinite(
                f"window {window} has hidden states in {self._place()} that are nan or infinite; the model's values "
                f"are too large for {str(self._states.dtype).removeprefix('torch.')}: use another copy of the model"
            )

    def fill(self, states: Iterable[Tensor]) -> None:
        """Write the states of every window, in order, as they come."""
        for window, state in enumerate(states):
            self[window] = state


class HiddenStates:
    """Two files used in turn: what the current decoder layer reads, and what it writes.

    Args:
        work: whose folder holds the files, and which says how many layers are finished.
        shape: windows, tokens and hidden size; no windows where none are needed.
        dtype: of the states.
        device: where the states of a window are used.
        name: of the files.
    """

    def __init__(
        self,
        work: Workplace,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device = CPU,
        name: str = "hidden",
    ) -> None:
        self._work, self._shape, self._dtype, self._device = work, shape, dtype, device
        paths = [work.scratch / f"{name}.{turn}" for turn in range(2)]
        self._files = [MappedStates(path, shape, dtype, device, self._place) for path in paths]

    def _place(self) -> str:
        return "the embedding" if self._work.done is None else f"decoder layer {self._work.done}"

    @property
    def before(self) -> MappedStates:
        """What the next layer reads."""
        return self._files[(self._work.done or 0) % 2]

    @property
    def after(self) -> MappedStates:
        """What the next layer writes."""
        return self._files[((self._work.done or 0) + 1) % 2]

    def beside(self, name: str) -> HiddenStates:
        """The same windows on their way through another model with the same embedding, in files of that name."""
        other = HiddenStates(self._work, self._shape, self._dtype, self._device, name)
        if self._work.done == 0:
            other.before.fill(self.before)
        return other

    def scratch(self, width: int) -> MappedStates:
        """A third file for states of another width within a layer."""
        path = self._work.scratch / "hidden.inner"
        return MappedStates(path, (*self._shape[:2], width), self._dtype, self._device, self._place)
