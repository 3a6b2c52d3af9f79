"""A model's `config.json` and `generation_config.json`, read by transformers once their values make sense.

transformers takes many values as they come and fails far from here, or computes something else without a word: rope
factors of another length are broadcast, for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kurtail_pl.errors import CheckpointError, shortened
from kurtail_pl.storage.records import read_object
from kurtail_pl.surgery.families import REGISTRY

CONFIG, GENERATION = "config.json", "generation_config.json"
AGAIN = "correct it, or copy it again from where the model comes from"
ROPE_KINDS = ("default", *ROPE_INIT_FUNCTIONS)

NEEDED = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Each kind of rotary positions needs these settings."""
NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")

SIZES = {
    "vocab_size": 2**32, "hidden_size": 2**20, "intermediate_size": 2**22, "moe_intermediate_size": 2**22,
    "num_hidden_layers": 2000, "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
    "num_local_experts": 2**12, "num_experts": 2**12, "n_routed_experts": 2**12,
    "num_experts_per_tok": 2**12, "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}  # fmt: skip
"""Each of these numbers is from 1 to its limit: a slip of ten digits would fill the memory with empty modules."""
OPTIONAL_SIZES = ("head_dim", "num_key_value_heads", "sliding_window")
EMPTY_SIZES = ("num_local_experts",)
"""These may be 0: dense members of a family of mixtures."""


class Wrong(NamedTuple):
    """A value that cannot be."""

    name: str
    value: Any
    expected: str


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder.

    Raises:
        CheckpointError: naming file, key, value and what was expected.
    """
    path = folder / CONFIG
    given = read_object(path, CheckpointError, AGAIN)
    if "model_type" not in given:
        raise CheckpointError(f"{path} has no model_type; {AGAIN}")
    _refuse(path, _wrong_numbers(given))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Whatever its classes raise for values of other types.
        raise CheckpointError(f"{path} cannot be used ({_said(error)}); {AGAIN}") from error
    if config.model_type in REGISTRY:
        _drop_undeclared(config)
        _refuse(path, _wrong_values(config))
    return config


def _drop_undeclared(config: PretrainedConfig) -> None:
    """Take away what the model's class does not read though others do: its windows would then be used here alone."""
    declared = getattr(type(config), "__dataclass_fields__", ("sliding_window", "layer_types"))
    for name in ("sliding_window", "layer_types"):
        if name not in declared and hasattr(config, name):
            delattr(config, name)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """How a model folder's authors would generate; None where they do not say.

    Raises:
        CheckpointError: when the file is damaged or holds what cannot be.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    read_object(path, CheckpointError, f"{AGAIN}, or remove it")
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # As above.
        raise CheckpointError(f"{path} cannot be used ({_said(error)}); {AGAIN}, or remove it") from error


def _said(error: Exception) -> str:
    """What a foreign exception says: the innermost, where one wraps another; of a KeyError, its kind too."""
    text = " ".join(str(error).split())
    said = re.split(r"\w+Error: ", text)[-1] or text
    return shortened(f"{type(error).__name__} {said}" if isinstance(error, KeyError) else said, 120)


def _refuse(path: Path, wrong: Iterator[Wrong]) -> None:
    for name, value, expected in wrong:
        raise CheckpointError(
            f"{path}: {shortened(name, 50)} is {shortened(repr(value), 40)}, expected {expected}; {AGAIN}"
        )


def _wrong_numbers(given: dict[str, Any], within: str = "") -> Iterator[Wrong]:
    """Sizes that are no sizes, and numbers that JSON does not have."""
    for key, value in given.items():
        name = f"{within}{key}"
        if isinstance(value, float) and not math.isfinite(value):
            yield Wrong(name, value, "a finite number")
        if isinstance(value, dict) and len(within) < 100:
            yield from _wrong_numbers(value, f"{name}.")
        largest = SIZES.get(key)
        if largest is None or (value is None and key in OPTIONAL_SIZES) or within:
            continue
        smallest = int(key not in EMPTY_SIZES)
        if type(value) is not int or not smallest <= value <= largest:
            yield Wrong(name, value, f"a whole number from {smallest} to {largest}")


def _wrong_values(config: PretrainedConfig) -> Iterator[Wrong]:
    """What contradicts another value, or names what transformers does not have."""
    yield from _wrong_heads(config)
    yield from _wrong_choices(config)
    yield from _wrong_layers(config)
    share = getattr(config, "partial_rotary_factor", None)
    yield from _wrong_rope(getattr(config, "rope_parameters", None), _head_dim(config), share, "rope_parameters")


def _head_dim(config: PretrainedConfig) -> int:
    heads, hidden = getattr(config, "num_attention_heads", 1), getattr(config, "hidden_size", 1)
    head_dim: int = getattr(config, "head_dim", None) or hidden // heads
    return head_dim


def _wrong_heads(config: PretrainedConfig) -> Iterator[Wrong]:
    """Heads that divide nothing, or have no halves."""
    heads, hidden = getattr(config, "num_attention_heads", 1), getattr(config, "hidden_size", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        yield Wrong("num_key_value_heads", kv_heads, f"a divisor of the {heads} num_attention_heads")
    if getattr(config, "head_dim", None) is None and hidden % heads:
        yield Wrong("num_attention_heads", heads, f"a divisor of the hidden_size {hidden}, or a head_dim")
    if (head_dim := _head_dim(config)) % 2:
        yield Wrong("head_dim", head_dim, "an even number, for rotary positions")


def _wrong_choices(config: PretrainedConfig) -> Iterator[Wrong]:
    """Activation, padding and epsilon that there are not, and a mixture of nothing."""
    if REGISTRY[config.model_type].experts is not None and getattr(config, "num_local_experts", None) == 0:
        yield Wrong("num_local_experts", 0, "1 or more")
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        yield Wrong("hidden_act", activation, "an activation of transformers, such as silu")
    pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", 1)
    if pad is not None and (type(pad) is not int or not -vocabulary <= pad < vocabulary):
        yield Wrong("pad_token_id", pad, f"a token below the vocab_size {vocabulary}, or null")
    epsilon = getattr(config, "rms_norm_eps", 1e-6)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        yield Wrong("rms_norm_eps", epsilon, "a number from 0 to 1")


def _wrong_layers(config: PretrainedConfig) -> Iterator[Wrong]:
    """Kinds of attention for other layers, or without their window."""
    kinds, layers = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", 0)
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        yield Wrong("layer_types", kinds, f"a list of {layers}, one for each layer")
    elif "sliding_attention" in (kinds or ()) and getattr(config, "sliding_window", None) is None:
        yield Wrong("sliding_window", None, "a number of tokens, as layer_types has sliding_attention")


def _wrong_rope(rope: Any, head_dim: int, share: Any, name: str) -> Iterator[Wrong]:
    """Rotary positions of an unknown kind, or without what their kind needs."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        yield Wrong(name, rope, "an object with a rope_type")
        return
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for key, value in nested.items():
        yield from _wrong_rope(value, head_dim, share, f"{name}.{key}")
    if not nested:
        yield from _wrong_settings(rope, name)
        yield from _wrong_factors(rope, head_dim, share, name)


def _wrong_settings(rope: dict[str, Any], name: str) -> Iterator[Wrong]:
    """An unknown kind, one without what it needs, numbers that cannot be."""
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        yield Wrong(f"{name}.rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
        return
    for key in NEEDED.get(kind, ()):
        if rope.get(key) is None:
            yield Wrong(f"{name}.{key}", None, f"a value, as rope_type is {kind}")
    for key in NUMBERS:
        number: Any = rope.get(key)
        if number is not None and not _positive(number):
            yield Wrong(f"{name}.{key}", number, "a positive number")


def _wrong_factors(rope: dict[str, Any], head_dim: int, share: Any, name: str) -> Iterator[Wrong]:
    """A share of a head that is none, or not a factor for each of its frequencies."""
    share = rope.get("partial_rotary_factor") or share or 1.0
    if not _positive(share) or share > 1:
        yield Wrong("partial_rotary_factor", share, "a number from 0 to 1")
        return
    rotated = int(head_dim * share) // 2
    for key in ("short_factor", "long_factor"):
        factors: Any = rope.get(key)
        alike = isinstance(factors, list) and len(factors) == rotated and all(map(_positive, factors))
        if factors is not None and not alike:
            yield Wrong(f"{name}.{key}", factors, f"{rotated} positive numbers, half of what is rotated of a head")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
