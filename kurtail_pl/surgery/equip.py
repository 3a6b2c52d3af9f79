"""A model with the modules that a scheme and rotations ask for, weights still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kurtail_pl.errors import CheckpointError, ConfigError, KurtailError, reason, shortened
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.maths.quantizers import Grid, require_groups
from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import Part, Site
from kurtail_pl.surgery.architecture import Architecture, check_layer
from kurtail_pl.surgery.attention import ATTENTION, equip_attention, put_found, put_prefix, subtract_from_keys
from kurtail_pl.surgery.before_rope import keep_where_made
from kurtail_pl.surgery.exact import exact_class
from kurtail_pl.surgery.experts import separate_experts
from kurtail_pl.surgery.families import architecture_of, mlp_widths
from kurtail_pl.surgery.linear import QuantizedLinear, put_side, read_together, side_buffers
from kurtail_pl.surgery.rotations import Rotations, head_dim_of
from kurtail_pl.surgery.scaled_embedding import ScaledEmbedding


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without memory for its weights (device ``meta``), in evaluation mode.

    Rotary frequencies are no weights and are computed here. Experts are modules of their own (`Experts`).

    Raises:
        UnsupportedArchitecture: when the model's type or its layers do not match a record.
        CheckpointError: when transformers cannot make the model.
    """
    attention = "eager" if architecture_of(config).learned_sinks else "sdpa"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=attention, trust_remote_code=False
            )
        take_over(model)
    except KurtailError:
        raise
    except Exception as error:  # Whatever a model's class raises for values that it cannot have.
        raise CheckpointError(
            f"the config.json of {config.name_or_path or config.model_type} makes no model "
            f"({type(error).__name__}: {reason(error)}); correct it"
        ) from error
    return model


def take_over(model: PreTrainedModel) -> None:
    """Put modules of our own into an empty model that transformers made: single experts, buffers that no cast changes.

    Raises:
        UnsupportedArchitecture: when the model's type or its layers do not match a record.
    """
    architecture = architecture_of(model.config)
    rotary = model.get_submodule(architecture.rotary)
    model.set_submodule(architecture.rotary, exact_class(type(rotary))(config=model.config))
    if architecture.scaled_embedding:
        embedding = cast(nn.Embedding, model.get_submodule(architecture.embedding))
        model.set_submodule(architecture.embedding, ScaledEmbedding(embedding))
    for layer in layers_of(model, architecture):
        if architecture.choosing_bias is not None and architecture.has_experts(layer):
            holder = architecture.choosing_bias.rpartition(".")[0]
            with torch.device("meta"):
                layer.set_submodule(holder, exact_class(type(layer.get_submodule(holder)))(model.config))
        separate_experts(layer, architecture)
        check_layer(layer, architecture)
    model.train(False).requires_grad_(False)


def layers_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The decoder layers."""
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def require_scheme_fits(config: PretrainedConfig, scheme: Scheme) -> None:
    """Raise ConfigError when a model's widths or layers are not what a scheme's groups or bits of layers need."""
    bits, layers = scheme.layer_bits, config.num_hidden_layers
    if bits is not None and len(bits) != layers:
        raise ConfigError(f"layer_bits are {len(bits)} numbers and this model has {layers} layers; give one for each")
    head_dim = head_dim_of(config)
    inputs = (config.hidden_size, config.num_attention_heads * head_dim, *mlp_widths(config))
    if scheme.weights is not None:
        scheme.weights.require("weights", inputs)
    if scheme.side is not None:
        scheme.side.require(inputs)
    if scheme.activations is not None:
        require_groups("activations", scheme.activations.group_size, inputs)
    if scheme.cache is not None:
        scheme.cache.require(head_dim)


def equip_model(model: PreTrainedModel, scheme: Scheme, rotations: Rotations) -> None:
    """Replace linears and attention of every layer by those that rotate online and quantize."""
    architecture = architecture_of(model.config)
    model.set_attn_implementation(ATTENTION)
    for layer in layers_of(model, architecture):
        equip_layer(layer, architecture, scheme, rotations, head_dim_of(model.config))


def equip_layer(
    layer: nn.Module, architecture: Architecture, scheme: Scheme, rotations: Rotations, head_dim: int
) -> None:
    """Replace linears and attention of one decoder layer; float weights stay what they are."""
    online = online_rotations(layer, architecture, rotations)
    special = {architecture.output: scheme.output_activations(head_dim)}
    for name in architecture.linears(layer):
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer.set_submodule(name, QuantizedLinear(linear, online.get(name), special.get(name, scheme.activations)))
    for linears in readers_alike(layer, architecture):
        read_together(linears)
    attention = layer.get_submodule(architecture.attention)
    equip_attention(attention, rotations.query_key, scheme.cache)
    if scheme.cache is not None and scheme.cache.before_rope:
        keep_where_made(layer, architecture, head_dim)


def online_rotations(layer: nn.Module, architecture: Architecture, rotations: Rotations) -> dict[str, HadamardFactors]:
    """The linears of a decoder layer whose input is rotated at run time, and by what: R4, R5 and block inputs' R1."""
    online = {architecture.output: rotations.attention_output}
    if rotations.block_input is not None:
        first = 2 * cast(int, layer.get_submodule(architecture.attention).layer_idx)
        for site, names in enumerate((architecture.attention_readers, architecture.mlp_readers(layer)), first):
            online |= dict.fromkeys(names, rotations.block_input.of(site))
    for name in architecture.mlp_writers(layer):
        online[name] = rotations.hidden(cast(nn.Linear, layer.get_submodule(name)).in_features)
    return {name: factors for name, factors in online.items() if factors is not None}


def expect_quantized(model: PreTrainedModel, scheme: Scheme) -> None:
    """Make every equipped module expect what quantization adds to a checkpoint.

    That is a prefix, centres, grids, what a cache found, codes and sides.
    """
    architecture = architecture_of(model.config)
    heads, head_dim = model.config.num_key_value_heads, head_dim_of(model.config)
    for index, layer in enumerate(layers_of(model, architecture)):
        attention = layer.get_submodule(architecture.attention)
        if scheme.prefix is not None:
            states = torch.empty(2, heads, len(scheme.prefix), head_dim, device="meta")
            put_prefix(attention, *states)
        if scheme.centre_keys:
            subtract_from_keys(attention, torch.empty(heads, 1, head_dim, device="meta"))
        if scheme.cache is not None:
            put_found(attention, _empty(scheme.cache.buffers(heads, head_dim)))
        quantizer = scheme.layer_weights(index)
        for module in layer.modules():
            if isinstance(module, QuantizedLinear):
                if scheme.centre:
                    assert module.weight is not None
                    module.subtract(module.weight.new_empty(module.in_features))
                if scheme.static:
                    assert module.activations is not None
                    one = torch.empty(1, device="meta")
                    module.fix_grid(Grid(one, None if module.activations.symmetric else one))
                if quantizer is not None:
                    module.expect_codes(quantizer)
        if scheme.side is not None:
            for linears in readers_alike(layer, architecture):
                put_side(linears, scheme.side, _empty(side_buffers(linears, scheme.side)))


def _empty(buffers: Mapping[str, Buffer]) -> Tensors:
    """Tensors without memory."""
    return {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in buffers.items()}


def readers_alike(layer: nn.Module, architecture: Architecture) -> list[list[QuantizedLinear]]:
    """All linears of an equipped decoder layer, those together that read the same inputs."""
    return [
        [cast(QuantizedLinear, layer.get_submodule(name)) for name in names]
        for names in architecture.readers_alike(layer)
    ]


def set_clips(model: PreTrainedModel, clips: Sequence[Mapping[str, float]]) -> None:
    """Give each layer's quantizers the clip ratios that were found for them, by their places in the layer.

    Raises:
        ConfigError: when there are not as many as layers, or a layer has no quantizer at a place.
    """
    layers = layers_of(model, architecture_of(model.config))
    if len(clips) != len(layers):
        raise ConfigError(f"clips are for {len(clips)} layers and the model has {len(layers)}; make the artefact again")
    for layer, ratios in zip(layers, clips, strict=True):
        set_layer_clips(layer, ratios)


def set_layer_clips(layer: nn.Module, ratios: Mapping[str, float]) -> None:
    """Give the quantizers of one layer their clip ratios, by their places in it.

    Raises:
        ConfigError: when there is no quantizer at a place.
    """
    modules = dict(layer.named_modules())
    for place, ratio in ratios.items():
        name, _, part = place.rpartition(".")
        site = Site(cast(Part, part), {name: modules[name]}) if name in modules else None
        if site is None or site.quantizer is None:
            raise ConfigError(
                f"clips name {shortened(repr(place), 60)}, where no quantizer is; make the artefact again"
            )
        site.clip(ratio)


def unpacked_bytes(model: PreTrainedModel) -> int:
    """Bytes that `unpack_weights` will take."""
    weights = sum(module.in_features * module.out_features for module in _simulated(model))
    return weights * torch.float32.itemsize


def unpack_weights(model: PreTrainedModel) -> None:
    """Turn packed weights of a loaded model into floats once, instead of at every use; logits stay bit for bit.

    Those that are multiplied as integers stay packed.
    """
    for module in _simulated(model):
        module.unpack()


def _simulated(model: PreTrainedModel) -> list[QuantizedLinear]:
    """Linears whose packed weight is made floats whenever it is used."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return [linear for linear in linears if linear.weight is None and not linear.multiplies_integers]
