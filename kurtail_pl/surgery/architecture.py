"""What a model family looks like, as data; the records themselves are in `families`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from kurtail_pl.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a decoder-only RMSNorm model are, by module name.

    Args:
        model_type: of the configuration.
        embedding: token embedding; with `layers`, `final_norm`, `rotary` and `head` named from the model.
        layers: list of decoder layers.
        final_norm: norm before the head.
        rotary: module that makes the rotary angles.
        head: from hidden states to logits.
        attention: attention block; with all that follow named from a decoder layer.
        attention_norm: norm that the query, key and value projections read.
        query: projections to queries, keys and values. A family that fuses them names one module three times; its rows
            are queries, keys and values, in this order.
        key: see `query`.
        value: see `query`.
        output: projection of the attention output.
        head_norms: norms of single query and key heads; rotations leave them alone.
        head_norms_key: key of the configuration that says whether a model has these norms; None where all have them.
        whole_norms: whether these norms are of all heads at once, before they are taken apart.
        norms_after_rope: whether RoPE comes before the norms of heads, not behind them.
        query_scale: key among the rotary parameters of beta, where queries are multiplied by
            ``1 + beta log(1 + floor(position / original positions))``.
        learned_sinks: whether each query head has a learned score of no key, which takes its share of the softmax.
            transformers computes such attention in plain torch alone.
        mlp: MLP block.
        mlp_norm: norm that the MLP block reads.
        gate: projections of a gated MLP, named from the MLP or, in a mixture, from one expert. A family that fuses
            gate and up names one module twice; None where what up writes goes through the activation alone.
        up: see `gate`.
        down: see `gate`.
        norm_offset: what all norms of the family add to their weight before they multiply by it.
        attention_post_norm: norm of what the attention writes, before that is added to the stream; None for none.
        mlp_post_norm: the same of the MLP block.
        rigid_residual: why the residual stream cannot be turned (R1) by the linears that write it, in words; None where
            it can. Block inputs are turned online then, each by a rotation of its own.
        scaled_embedding: whether the embedding itself multiplies by a number, `scalar_embed_scale`.
        rotary_by_kind: whether layers of each kind (`layer_types`) have rotary angles of their own.
        logits_cap: key of the configuration that holds c, where logits are ``c tanh(logits / c)``; None for none, also
            as its value.
        embedding_multiplier: key of the configuration that holds what embeddings are multiplied by; None for nothing.
            Numbers commute with rotations; so do the next two.
        residual_multiplier: the same for what a block adds to the residual stream.
        logits_divisor: the same for what logits are divided by.
        rigid_hidden: why channels that `down` reads cannot be multiplied where `up` writes them, in words; None where
            they can.
        kept: modules with numbers of their own that no rotation concerns.
        mlp_width: key of the configuration that holds the width `down` reads.
        router: what chooses experts; None for a dense model. It reads the MLP norm and stays float.
        experts: list of experts; None for a dense model. A mixture may have layers without: they have one gated MLP.
        shared: gated MLP beside the experts that every token meets, as wide as one of them; None where there is none.
        interleaved: whether experts are always stacked on disk, with rows of gate and up in turn, transposed, and have
            biases, and gate and up are clamped.
        routing: how the router weighs experts: the largest of a softmax, or of sigmoids within the best groups, where a
            bias that only chooses is added.
        choosing_bias: that bias; None for a softmax. It is given to a router that does not hold it.
        requires: (key of the configuration, values that it may have, what a model with others has), of a family with
            members that the record does not describe; a list may have these values alone.
        on_disk: (module name, name in checkpoints), parts of names that differ within a decoder layer.
    """

    model_type: str
    embedding: str
    layers: str
    final_norm: str
    rotary: str
    head: str

    attention: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str

    mlp: str
    mlp_norm: str
    gate: str | None
    up: str
    down: str

    head_norms: tuple[str, ...] = ()
    head_norms_key: str | None = None
    whole_norms: bool = False
    norms_after_rope: bool = False
    query_scale: str | None = None
    norm_offset: float = 0.0
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    rigid_residual: str | None = None
    scaled_embedding: bool = False
    rotary_by_kind: bool = False
    logits_cap: str | None = None
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    learned_sinks: bool = False
    rigid_hidden: str | None = None
    kept: tuple[str, ...] = ()
    mlp_width: str = "intermediate_size"
    router: str | None = None
    experts: str | None = None
    shared: str | None = None
    interleaved: bool = False
    routing: Literal["softmax", "sigmoid"] = "softmax"
    choosing_bias: str | None = None
    requires: tuple[tuple[str, tuple[object, ...], str], ...] = ()
    on_disk: tuple[tuple[str, str], ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of a decoder layer."""
        post = (self.attention_post_norm, self.mlp_post_norm)
        return (self.attention_norm, self.mlp_norm, *self.head_norms, *(name for name in post if name is not None))

    @property
    def attention_readers(self) -> tuple[str, ...]:
        """Linears of a layer that read the attention norm."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    def has_experts(self, layer: nn.Module) -> bool:
        """Whether a layer is a mixture; a mixture model may have dense layers in between."""
        return self.experts is not None and any(name == self.experts for name, _ in layer.named_modules())

    def router_of(self, layer: nn.Module) -> str | None:
        """What chooses a layer's experts; None for a dense layer."""
        return self.router if self.has_experts(layer) else None

    def routed_mlps(self, layer: nn.Module) -> tuple[str, ...]:
        """The experts of a layer; none of a dense one."""
        if self.experts is None or not self.has_experts(layer):
            return ()
        return tuple(f"{self.experts}.{name}" for name, _ in layer.get_submodule(self.experts).named_children())

    def common_mlps(self, layer: nn.Module) -> tuple[str, ...]:
        """The gated MLPs of a layer that every token meets: its only one, or one beside the experts, if any."""
        if not self.has_experts(layer):
            return (self.mlp,)
        return () if self.shared is None else (self.shared,)

    def gated_mlps(self, layer: nn.Module) -> tuple[str, ...]:
        """The gated MLPs of a layer: its only one, or every expert and what stands beside them."""
        return (*self.routed_mlps(layer), *self.common_mlps(layer))

    def mlp_readers(self, layer: nn.Module) -> tuple[str, ...]:
        """Linears of a layer that read the MLP norm."""
        return tuple(name for mlp in self.gated_mlps(layer) for name in self.gate_and_up(mlp))

    def gate_and_up(self, mlp: str) -> tuple[str, ...]:
        """The linears that read what one gated MLP reads; one name where they are fused, or there is no gate."""
        return tuple(dict.fromkeys(f"{mlp}.{name}" for name in (self.gate, self.up) if name is not None))

    def mlp_writers(self, layer: nn.Module) -> tuple[str, ...]:
        """Linears of a layer that write the MLP's output into the residual stream."""
        return tuple(f"{mlp}.{self.down}" for mlp in self.gated_mlps(layer))

    def readers_alike(self, layer: nn.Module) -> list[tuple[str, ...]]:
        """All linears of a layer, those together that read the same inputs."""
        found = [self.attention_readers, (self.output,)]
        for mlp in self.gated_mlps(layer):
            found += [self.gate_and_up(mlp), (f"{mlp}.{self.down}",)]
        return found

    def linears(self, layer: nn.Module) -> tuple[str, ...]:
        """All linears of a layer, in the order in which data reaches them."""
        return (*self.attention_readers, self.output, *self.mlp_readers(layer), *self.mlp_writers(layer))


def check_layer(layer: nn.Module, architecture: Architecture) -> None:
    """Compare a decoder layer with its record, both ways.

    Raises:
        UnsupportedArchitecture: naming the modules that the record expects and the layer lacks, and the modules with
            weights that the layer has and the record does not know.
    """
    modules = dict(layer.named_modules())
    expected = {*architecture.norms, *architecture.kept}
    if architecture.has_experts(layer):
        expected |= {name for name in (architecture.router, architecture.experts) if name is not None}
    expected |= set(architecture.linears(layer))
    missing = sorted(expected - set(modules))
    weighted = {name or "(the layer itself)" for name, m in modules.items() if list(m.parameters(recurse=False))}
    unknown = sorted(weighted - expected)
    if missing or unknown:
        raise UnsupportedArchitecture(
            f"the decoder layer does not match the record of {architecture.model_type!r}: "
            f"missing modules {missing}, unknown modules {unknown}; correct the record"
        )
