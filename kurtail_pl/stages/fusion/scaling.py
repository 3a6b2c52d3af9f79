"""Channel scales: measured on a text as it goes through the original layer, and folded with the rotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kurtail_pl.maths.scales import range_power
from kurtail_pl.stages.fusion.channels import Channels, Held, measured_inputs, measured_keys, measured_norms
from kurtail_pl.stages.fusion.rules import Balanced, Rule
from kurtail_pl.stages.fusion.scales import Ordered, Part, ScaleSpec
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.rotations import head_dim_of
from kurtail_pl.surgery.transform import Transform


class Measured:
    """What scales go by, measured on a text as it goes through the original layers, one after the other.

    Args:
        scales: whose channels; None measures nothing.
        architecture: record of the family.
        head_dim: size of a head.
        normed: what the norms will give, without their weights and after R1, by ``[tokens, hidden]`` states.
    """

    def __init__(
        self,
        scales: ScaleSpec | None,
        architecture: Architecture,
        head_dim: int,
        normed: Callable[[Tensor], Tensor],
    ) -> None:
        self.parts: Sequence[Part] = () if scales is None else scales.parts
        self.reorder: Sequence[Ordered] = () if scales is None else scales.reorder
        self.rule_of: Callable[[int], Rule] = (lambda layer: Balanced()) if scales is None else scales.rule_of
        self.architecture, self.head_dim, self.normed = architecture, head_dim, normed
        self.channels = Channels()

    @property
    def norms(self) -> bool:
        """Whether what norms give is scaled."""
        return bool({"attention_input", "mlp_input"} & set(self.parts))

    def inputs(self, parts: Sequence[str]) -> Iterator[tuple[str, Held]]:
        """Of the linears that read some parts, values or `mlp_hidden`: their names, and what they read."""
        for name, channels in self.channels.inputs.items():
            if ("values" if name == self.architecture.output else "mlp_hidden") in parts:
                yield name, channels

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """While an original layer runs, what its channels hold."""
        names, found = self.architecture, Channels()
        measured = {*self.parts, *self.reorder}
        inputs = [names.output] if "values" in measured else []
        inputs += names.mlp_writers(layer) if "mlp_hidden" in measured else ()
        norms = {"attention_input": names.attention_norm, "mlp_input": names.mlp_norm}
        with ExitStack() as stack:
            stack.enter_context(measured_inputs(layer, inputs, found))
            chosen = [norm for part, norm in norms.items() if part in self.parts]
            stack.enter_context(measured_norms(layer, chosen, self.normed, found))
            if "keys" in self.parts:
                stack.enter_context(measured_keys(layer, names, self.head_dim, found))
            self.channels = found
            yield


@dataclass(frozen=True)
class ScaleChannels(Transform):
    """Scales what R2, R3 and R5 will turn, before they do.

    Args:
        measured: what the channels hold.
        kv_heads: key and value heads.
        rotary: channels of a head that RoPE turns, the first half of them with the second.
    """

    measured: Measured
    kv_heads: int
    rotary: int

    sentence = "scaling the channels"

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """Measure, for the scales of norms too."""
        with self.measured.watching(layer):
            yield

    def fold(self, layer: nn.Module, index: int) -> bool:
        """By what the text held."""
        names, found, parts = self.measured.architecture, self.measured.channels, self.measured.parts
        rule = self.measured.rule_of(index)
        for name, channels in self.measured.inputs(parts):
            held, read = rule.held(channels), rule.read(folding.linear_of(layer, name).weight)
            if name == names.output:
                # The query heads of a group read the same values.
                held, read = (self._of_group(part, rule).flatten() for part in (held, read))
                scale = rule.scale(held, read)
                folding.scale_values(layer, names, scale.view(self.kv_heads, self.measured.head_dim))
            else:
                mlp = name.removesuffix(f".{names.down}")
                folding.scale_hidden(layer, names, mlp, rule.scale(held, read))
        if "keys" in parts:
            counted = rule.varied(found.keys), self._of_group(rule.held(found.queries), rule)
            pair = self._rope_pairs().to(counted[0].device)
            keys, queries = (rule.paired(x, pair) for x in counted)
            folding.scale_keys(layer, names, rule.keys(keys, queries)[:, pair])
        return bool(parts)

    def _of_group(self, x: Tensor, rule: Rule) -> Tensor:
        """Of the query heads of each KV head's group: ``[heads * head_dim]`` -> ``[kv_heads, head_dim]``."""
        return rule.joined(x.view(self.kv_heads, -1, self.measured.head_dim), 1)

    def _rope_pairs(self) -> Tensor:
        """Number, for each channel of a head, of the pair that RoPE turns together, or of the channel left alone."""
        channel, half = torch.arange(self.measured.head_dim), self.rotary // 2
        return torch.where(channel < self.rotary, channel % half, channel - half)


@dataclass(frozen=True)
class ReorderChannels(Transform):
    """Sorts channels by the largest magnitude that they had in the original layer, largest first.

    Args:
        measured: what the channels hold.
        kv_heads: key and value heads.
    """

    measured: Measured
    kv_heads: int

    sentence = "reordering the channels"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """Values within their head, for all query heads of a group."""
        names = self.measured.architecture
        for name, channels in self.measured.inputs(self.measured.reorder):
            if name == names.output:
                of_heads = channels.largest.view(self.kv_heads, -1, self.measured.head_dim).amax(1)
                folding.reorder_values(layer, names, _largest_first(of_heads))
            else:
                mlp = name.removesuffix(f".{names.down}")
                folding.reorder_hidden(layer, names, mlp, _largest_first(channels.largest))
        return bool(self.measured.reorder)


def _largest_first(x: Tensor) -> Tensor:
    return torch.argsort(x, dim=-1, descending=True, stable=True)


@dataclass(frozen=True)
class ScaleNorms(Transform):
    """Scales what the norms give, after R1."""

    measured: Measured

    sentence = "scaling the norms"

    def fold(self, layer: nn.Module, index: int) -> bool:
        """By what the text held."""
        names, found, rule = self.measured.architecture, self.measured.channels, self.measured.rule_of(index)
        linears = {names.attention_norm: names.attention_readers, names.mlp_norm: names.mlp_readers(layer)}
        for name, spread in found.normed.items():
            # A router, which reads the MLP norm too, is not quantized.
            read = rule.read(torch.cat([folding.linear_of(layer, linear).weight for linear in linears[name]]))
            scale = rule.scale(rule.varied(spread), read, range_power(len(read)))
            # In bfloat16, so that no type that the norm's weight is kept in rounds it.
            folding.scale_norm(layer, names, name, scale.bfloat16().to(scale.dtype))
        return bool(found.normed)


def scale_channels(
    walker: Walker, scales: ScaleSpec | None, normed: Callable[[Tensor], Tensor] = lambda states: states
) -> ScaleChannels:
    """Scales of the layers of a walker's model; `normed` as in `Measured`."""
    config, architecture = walker.checkpoint.config, walker.architecture
    # Keys are not scaled where layers have angles of their own: all such families have norms of heads.
    rotary = walker.model.get_submodule(architecture.rotary)
    frequencies = () if architecture.rotary_by_kind else cast(Tensor, rotary.inv_freq)
    measured = Measured(scales, architecture, head_dim_of(config), normed)
    return ScaleChannels(measured, config.num_key_value_heads, 2 * len(frequencies))
