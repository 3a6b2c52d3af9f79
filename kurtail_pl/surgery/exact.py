"""Buffers that a cast leaves as they are: rounded to half precision they would be another model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Exact(nn.Module):
    """A module with buffers that `.to(dtype)`, `.half()` and the like move and do not cast.

    Attributes:
        exact: names of these buffers; None for all that the module itself has.
    """

    exact: tuple[str, ...] | None = None

    def exact_buffers(self) -> dict[str, Tensor | None]:
        """These buffers, by name."""
        return {name: buffer for name, buffer in self._buffers.items() if self.exact is None or name in self.exact}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every cast and move of a module comes down to."""
        before = self.exact_buffers()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def exact_names(module: nn.Module) -> set[str]:
    """Names of the buffers, in whatever module of this one, that no cast changes."""
    return {name for part in module.modules() if isinstance(part, Exact) for name in part.exact_buffers()}


def exact_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of transformers, all of whose buffers are exact."""
    return type(kind.__name__, (Exact, kind), {"__module__": kind.__module__})
