"""Which rows of a model's sites capture keeps, where they are taken, and how they reach the store."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.storage.activations import Shape, SiteWriter
from kurtail_pl.surgery.architecture import Architecture

Values = Literal["projected", "attended"]
"""Which values a store holds: those of `v_proj`, or those that the attention mixed, `o_proj`'s input."""
SITES = ("attn_in", "value", "ffn_in")
"""The sites of one decoder layer."""


class Draw:
    """The tokens whose rows are kept: row r of every site is token order[r] of the text, in an order from the seed.

    Args:
        windows: of the text.
        seqlen: tokens in a window.
        rows: how many are kept, drawn without replacement.
        seed: decides which, and their order.
    """

    def __init__(self, windows: int, seqlen: int, rows: int, seed: int) -> None:
        self.rows = rows
        order = torch.randperm(windows * seqlen, generator=torch.Generator().manual_seed(seed))[:rows]
        tokens, self._places = order.sort()
        self._tokens = tokens % seqlen
        self._starts = torch.searchsorted(tokens, torch.arange(windows + 1) * seqlen).tolist()

    def window(self, number: int) -> tuple[Tensor, Tensor]:
        """The kept tokens of a window, counted from its first, and the rows that they become."""
        here = slice(self._starts[number], self._starts[number + 1])
        return self._tokens[here], self._places[here]


class Taps:
    """Hooks that see one decoder layer's three sites.

    Attributes:
        seen: what the last forward brought to each, ``[1, tokens, width]``.
    """

    def __init__(self, layer: nn.Module, architecture: Architecture, value_width: int, values: Values) -> None:
        self.seen: dict[str, Tensor] = {}
        names = (architecture.attention_norm, architecture.mlp_norm, architecture.value, architecture.output)
        attention_norm, mlp_norm, value, output = (layer.get_submodule(name) for name in names)
        behind = architecture.rigid_residual is not None
        self._handles = [
            self._input(attention_norm, "attn_in", behind),
            self._input(mlp_norm, "ffn_in", behind),
            output.register_forward_pre_hook(lambda _, args: self._see("value", args[0]))
            if values == "attended"
            # The last channels: queries and keys come first where one linear makes all three.
            else value.register_forward_hook(lambda _, __, made: self._see("value", made[..., -value_width:])),
        ]

    def _input(self, norm: nn.Module, name: str, behind: bool) -> RemovableHandle:
        """See a block's input before its norm, or behind it, where R1 turns what its linears read."""
        if behind:
            return norm.register_forward_hook(lambda _, __, made: self._see(name, made))
        return norm.register_forward_pre_hook(lambda _, args: self._see(name, args[0]))

    def _see(self, name: str, x: Tensor) -> None:
        self.seen[name] = x

    def rows(self, tokens: Tensor) -> dict[str, Tensor]:
        """Rows of some tokens of the last forward, ``[n, width]`` bfloat16 in memory."""
        return {name: x[0, tokens].to("cpu", torch.bfloat16) for name, x in self.seen.items()}

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class SiteFiles:
    """The files of one decoder layer's sites; the first process writes what all bring.

    Args:
        folder: of the store.
        layer: number of the layer.
        shape: of the store.
        rows: how many every site has.
        ranks: the processes that bring rows.
    """

    def __init__(self, folder: Path, layer: int, shape: Shape, rows: int, ranks: Ranks = ALONE) -> None:
        self._ranks, self._files = ranks, ExitStack()
        self._nothing = {name: torch.empty(0, shape.width(name), dtype=torch.bfloat16) for name in SITES}
        self._writers = {
            name: self._files.enter_context(SiteWriter(folder, f"layer{layer:03d}.{name}", rows, shape.width(name)))
            for name in (SITES if ranks.leads else ())
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def write(self, places: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Put the rows of every site to their places, ``[n]``; all processes call this together."""
        parts = self._ranks.gather(places.unsqueeze(1))
        for name in SITES:
            for where, part in zip(parts, self._ranks.gather(rows[name]), strict=True):
                self._writers[name].write(where.flatten(), part)

    def write_nothing(self) -> None:
        """Take part in a `write` without rows."""
        self.write(torch.empty(0, dtype=torch.int64), self._nothing)
