"""Linears that are quantized alike, and the configuration that says so in the words of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import compressed_tensors
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.layout import checkpoint_name
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_vllm.settings import Activations

PACKED: Literal["pack-quantized"] = "pack-quantized"


@dataclass(frozen=True)
class Form:
    """How a linear is quantized.

    Args:
        weights: integers of its weight.
        activations: of what it reads; None leaves that float.
    """

    weights: Quantizer
    activations: Quantizer | None


def linears_of(source: Source) -> Iterator[tuple[str, QuantizedLinear]]:
    """All linears of the decoder layers by their names in the whole model, in the order in which data reaches them."""
    for index, layer in enumerate(source.layers):
        for name in source.architecture.linears(layer):
            yield f"{source.layer_name(index)}.{name}", cast(QuantizedLinear, layer.get_submodule(name))


def place_of(linear: str, architecture: Architecture) -> str:
    """Name in checkpoints of a linear that our modules call so."""
    return checkpoint_name(f"{linear}.weight", architecture).removesuffix(".weight")


def form_of(linear: QuantizedLinear, activations: Activations) -> Form:
    """The form of a linear whose weights have one."""
    assert linear.weights is not None
    weights = linear.weights.integers
    assert weights is not None
    return Form(weights, None if activations == "none" else linear.activations)


def quantization_config(source: Source, activations: Activations) -> dict[str, Any]:
    """What ``config.json`` says of the weights and of what linears read, without transforms.

    Where all linears are alike they are one group of the class ``Linear``; else each group has their names, which is
    what vLLM and transformers look for first.
    """
    groups: dict[Form, list[str]] = {}
    for name, linear in linears_of(source):
        groups.setdefault(form_of(linear, activations), []).append(place_of(name, source.architecture))
    config = QuantizationConfig(
        config_groups={
            f"group_{number}": QuantizationScheme(
                targets=["Linear"] if len(groups) == 1 else names,
                weights=weight_arguments(form.weights),
                input_activations=None if form.activations is None else input_arguments(form.activations),
                output_activations=None,
                format=PACKED,
            )
            for number, (form, names) in enumerate(groups.items())
        },
        quant_method="compressed-tensors",
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_float_linears(source),
        kv_cache_scheme=None,
        global_compression_ratio=None,
    )
    # What is not set here may be unknown to an older version of the library, which then refuses it.
    return {**config.model_dump(mode="json", exclude_unset=True), "version": compressed_tensors.__version__}


def weight_arguments(quantizer: Quantizer) -> QuantizationArgs:
    """Of a weight, with one scale for each output channel or group of inputs."""
    return QuantizationArgs(
        num_bits=quantizer.bits,
        type="int",
        symmetric=quantizer.symmetric,
        strategy="channel" if quantizer.group_size is None else "group",
        group_size=quantizer.group_size,
        dynamic=False,
        actorder=None,
    )


def input_arguments(quantizer: Quantizer) -> QuantizationArgs:
    """Of what linears read, with one scale for each token, or group of its channels, from its values."""
    return QuantizationArgs(
        num_bits=quantizer.bits,
        type="int",
        symmetric=quantizer.symmetric,
        strategy="token" if quantizer.group_size is None else "group",
        group_size=quantizer.group_size,
        dynamic=True,
    )


def _float_linears(source: Source) -> list[str]:
    """Linears that stay float: the head, and the routers of a mixture."""
    architecture = source.architecture
    routers = [] if architecture.router is None else [checkpoint_name(architecture.router, architecture)]
    return [architecture.head, *(f"re:.*{re.escape(name)}$" for name in routers)]
