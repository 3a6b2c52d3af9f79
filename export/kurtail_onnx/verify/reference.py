"""The torch side of a comparison: the artefact's model as an export runs it, and the codes of its cache."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kurtail_onnx.forms import cache_integers_of
from kurtail_onnx.settings import Settings
from kurtail_onnx.verify.head import mirrored
from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import quantize
from kurtail_pl.methods import CacheFormat
from kurtail_pl.storage.checkpoint import to_float
from kurtail_pl.surgery.attention import keys_of
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.gate import use_exact_layer, use_exact_norm
from kurtail_pl.surgery.layout import module_state
from kurtail_pl.surgery.linear import QuantizedLinear


def empty_reference(source: Source, spec: Settings) -> PreTrainedModel:
    """Modules of the artefact without weights; activations stay float where the export leaves them."""
    model = skeleton(source.checkpoint)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and spec.act == "none":
            module.activations = None
    return model


def whole_reference(source: Source, spec: Settings) -> PreTrainedModel:
    """The artefact's model, float32, or float64 for an export in double, all of it in memory."""
    model = empty_reference(source, spec)
    checkpoint, dtype = source.checkpoint, torch.float64 if spec.dtype == "fp64" else torch.float32
    state = {name: to_float(checkpoint.tensor(name), dtype) for name in checkpoint.names}
    model.load_state_dict(module_state(state, source.architecture), assign=True)
    name = source.architecture.head
    model.set_submodule(name, mirrored(cast(nn.Linear, model.get_submodule(name)), spec.head))
    if dtype == torch.float64:
        for layer in layers_of(model, source.architecture):
            use_exact_layer(layer, source.architecture, source.config.rms_norm_eps)
        use_exact_norm(model, source.architecture.final_norm, source.config.rms_norm_eps)
    return model


def cached_codes(attention: nn.Module, cache: DynamicCache, layer: int) -> dict[str, Tensor]:
    """Codes of a layer's cached keys and values, ``[batch, kv_heads, tokens, head_dim]``; float parts are left out.

    The cache of the simulation holds keys before R3, maps, centring and quantization, and values before quantization.
    """
    cached = cast(DynamicLayer, cache.layers[layer])
    keys, values = keys_of(attention, cast(Tensor, cached.keys)), cast(Tensor, cached.values)
    kept = cache_integers_of(cast(CacheFormat | None, attention.cache))
    assert kept is not None
    states = {"key": (keys, kept.keys), "value": (values, kept.values)}
    return {name: quantize(x, q).codes for name, (x, q) in states.items() if q is not None}
