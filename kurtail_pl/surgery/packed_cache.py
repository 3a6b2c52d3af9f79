"""A cache of `transformers` that holds what a format stores of keys and values, instead of the floats it stands for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import CacheFormat
from kurtail_pl.methods.format import Tensors
from kurtail_pl.surgery.attention import keys_of, mark_kept


class PackedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention module: codes, scales and zero points, each growing along the tokens.

    Args:
        attention: equipped, with a cache whose format has a stored form.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attention = attention
        self.stored: dict[str, Tensors] = {}

    @property
    def format(self) -> CacheFormat:
        """How they are kept."""
        return cast(CacheFormat, self.attention.cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make room for."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[batch, kv_heads, tokens, head_dim]``; gives all, as attention reads them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"keys": keys_of(self.attention, key_states), "values": value_states}
        for part, states in new.items():
            stored = self.format.stored(part, states)
            before = self.stored.get(part)
            self.stored[part] = (
                stored if before is None else {name: torch.cat([before[name], stored[name]], -2) for name in stored}
            )
        keys, values = (self.format.read(part, self.stored[part]) for part in new)
        return mark_kept(keys), values

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return next(iter(self.stored["keys"].values())).shape[-2] if self.stored else 0

    def reset(self) -> None:
        """Forget everything."""
        self.stored = {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is below zero, as `transformers` has it."""
        if tokens_to_remove and self.stored:
            self._change(lambda tensor: tensor[..., :tokens_to_remove, :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Texts in another order, for beam search."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each text several times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the texts."""
        self._change(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        """To the CPU."""
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to where it is used."""
        self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    @property
    def bytes(self) -> int:
        """What is held."""
        tensors = [tensor for part in self.stored.values() for tensor in part.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _change(self, change: Any) -> None:
        self.stored = {
            part: {name: change(tensor) for name, tensor in tensors.items()} for part, tensors in self.stored.items()
        }


def keep_packed(model: PreTrainedModel, attentions: list[nn.Module]) -> None:
    """Let a model begin each text with a packed cache, in `forward` and `generate` alike.

    Args:
        model: equipped.
        attentions: of its layers, in order.

    Raises:
        ConfigError: when the format of its cache has no stored form.
    """
    for attention in attentions:
        cache: CacheFormat | None = attention.cache  # type: ignore[assignment]
        if cache is None or not cache.packs:
            kept = "keys and values in floating point" if cache is None else cache.sentence()
            raise ConfigError(
                f"cache is packed, and the artefact keeps {kept}, which has no packed form; leave cache out, or "
                "quantize with scheme.cache.class_path: kurtail_pl.methods.PerTokenHead and sinks: null"
            )

    def begin(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        past, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache", model.config.use_cache)
        unused = past is None or (type(past) is DynamicCache and past.get_seq_length() == 0)
        if wanted and unused:
            kwargs = {**kwargs, "past_key_values": Cache(layers=[PackedLayer(each) for each in attentions])}
        return args, kwargs

    model.register_forward_pre_hook(begin, with_kwargs=True)
