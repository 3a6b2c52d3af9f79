"""Rotary embeddings in a GGUF file: metadata, and tensors that divide frequencies."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kurtail_gguf.families import Family
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError

ORIGINAL = "original_max_position_embeddings"


class Rope(NamedTuple):
    """Keys of the architecture behind ``rope.``, and tensors ``[head_dim / 2]`` by their names."""

    keys: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]


def rope_of(source: Source, family: Family) -> Rope:
    """Rotary embeddings of an artefact's model.

    Raises:
        ConfigError: when llama.cpp does not compute them so.
    """
    parameters: dict[str, Any] = dict(source.config.rope_parameters)
    part, kind = float(parameters.get("partial_rotary_factor", 1.0)), parameters["rope_type"]
    if part != 1 and family.name != "phi3":
        raise ConfigError(
            f"partial_rotary_factor is {part} and llama.cpp's {family.name} turns whole heads; use another exporter"
        )
    keys = {"dimension_count": int(source.head_dim * part), "freq_base": float(parameters["rope_theta"])}
    scaled = {"default": _default, "linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}.get(kind)
    known = {"llama3": family.frequencies, "longrope": family.name == "phi3"}.get(kind, True)
    if scaled is None or not known:
        raise ConfigError(
            f"rope_type is {kind!r}, which llama.cpp's {family.name} does not compute; write another in the model's "
            "config.json, for texts that need no scaling rope_type: default"
        )
    more, tensors = scaled(source, parameters)
    return Rope(keys | more, tensors)


def _default(source: Source, parameters: dict[str, Any]) -> Rope:
    return Rope({}, {})


def _linear(source: Source, parameters: dict[str, Any]) -> Rope:
    return Rope({"scaling.type": "linear", "scaling.factor": float(parameters["factor"])}, {})


def _yarn(source: Source, parameters: dict[str, Any]) -> Rope:
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](source.config, torch.device("cpu"))
    factor = float(parameters.get("factor") or source.config.max_position_embeddings / parameters[ORIGINAL])
    if not math.isclose(attention, 0.1 * math.log(factor) + 1, rel_tol=1e-6) or not parameters.get("truncate", True):
        raise ConfigError(
            "rope_parameters has attention_factor, mscale or truncate, and llama.cpp computes YaRN with their usual "
            "values; leave them out of the model's config.json, or use another exporter"
        )
    keys = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": int(parameters[ORIGINAL]),
        "scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32.0),
        "scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1.0),
    }
    return Rope(keys, {})


def _llama3(source: Source, parameters: dict[str, Any]) -> Rope:
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
    exponent = torch.arange(0, source.head_dim, 2, dtype=torch.float32) / source.head_dim
    plain = 1 / float(parameters["rope_theta"]) ** exponent
    return Rope({}, {"rope_freqs.weight": (plain / found).numpy()})


def _longrope(source: Source, parameters: dict[str, Any]) -> Rope:
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](source.config, torch.device("cpu"))
    keys = {
        "scaling.original_context_length": int(parameters[ORIGINAL]),
        "scaling.attn_factor": float(attention),
    }
    factors = {kind: np.asarray(parameters[f"{kind}_factor"], np.float32) for kind in ("long", "short")}
    return Rope(keys, {f"rope_factors_{kind}.weight": values for kind, values in factors.items()})
