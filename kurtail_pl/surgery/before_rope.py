"""Keys before RoPE, and values, where their linears or norms write them: watched, and kept as a format says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kurtail_pl.methods import CacheFormat
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import found_by

See = Callable[[str, Tensor], object]
"""Is told ``keys`` or ``values``, and the states ``[batch, kv_heads, tokens, head_dim]``."""


class Written(NamedTuple):
    """Where the keys or values of a decoder layer are written last before RoPE.

    Args:
        part: ``keys`` or ``values``.
        module: whose output has them.
        columns: which of the last dimension.
        head_dim: size of a head.
    """

    part: str
    module: nn.Module
    columns: slice
    head_dim: int

    def states(self, written: Tensor) -> Tensor:
        """Of an output ``[batch, tokens, ...]``: ``[batch, kv_heads, tokens, head_dim]``."""
        return written[..., self.columns].reshape(*written.shape[:2], -1, self.head_dim).transpose(1, 2)

    def put(self, written: Tensor, states: Tensor) -> Tensor:
        """An output with other states in their place."""
        own = written[..., self.columns]
        start, stop, _ = self.columns.indices(written.shape[-1])
        return torch.cat([written[..., :start], states.transpose(1, 2).reshape(own.shape), written[..., stop:]], -1)


def written_in(layer: nn.Module, architecture: Architecture, head_dim: int) -> list[Written]:
    """Keys and values of a layer: behind a norm of key heads that RoPE follows, and where one linear makes all."""
    value, whole = layer.get_submodule(architecture.value), slice(None)
    norms = () if architecture.norms_after_rope else architecture.head_norms
    if architecture.value == architecture.query:
        # Queries, keys and values, in this order. What the output reads says less: it may be set aside meanwhile.
        config = cast(PretrainedConfig, layer.get_submodule(architecture.attention).config)
        size = config.num_key_value_heads * head_dim
        columns = {"keys": slice(-2 * size, -size), "values": slice(-size, None)}
    else:
        columns = {"keys": whole, "values": whole}
    key = layer.get_submodule(norms[-1] if norms else architecture.key)
    if norms:
        columns["keys"] = whole
    modules = {"keys": key, "values": value}
    return [Written(part, modules[part], columns[part], head_dim) for part in ("keys", "values")]


def keep_where_made(layer: nn.Module, architecture: Architecture, head_dim: int) -> None:
    """Let an equipped layer's keys and values be what the format of its cache keeps of them, before RoPE."""
    attention = layer.get_submodule(architecture.attention)
    for place in written_in(layer, architecture, head_dim):
        # What a copy of the layer calls is its own attention: deepcopy goes through what a partial holds.
        place.module.register_forward_hook(partial(_keep, attention, place.part, place.columns, head_dim))


def _keep(
    attention: nn.Module, part: str, columns: slice, head_dim: int, module: nn.Module, _: object, written: Tensor
) -> Tensor | None:
    cache: CacheFormat | None = attention.cache  # type: ignore[assignment]
    found = found_by(attention)
    if cache is None or not cache.before_rope or not found:
        return None
    place = Written(part, module, columns, head_dim)
    keep = cache.kept_keys if part == "keys" else cache.kept_values
    return place.put(written, keep(place.states(written), None, found))


@contextmanager
def watched_states(layer: nn.Module, architecture: Architecture, head_dim: int, see: See) -> Iterator[None]:
    """Show keys before RoPE and values to a function while a layer runs, as its modules write them."""
    places = written_in(layer, architecture, head_dim)
    hooks = [place.module.register_forward_hook(partial(_show, place, see)) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _show(place: Written, see: See, module: nn.Module, _: object, written: Tensor) -> None:
    see(place.part, place.states(written))
