"""Which stored tensor fills which parameter of a model.

The rule is transformers' own and is decided here and nowhere else. What transformers would fill with random numbers, or
leave out although the model's own modules hold it, is refused.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from transformers import PretrainedConfig

from kurtail_pl.errors import CheckpointError, first_of
from kurtail_pl.storage.weights import Stored
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.equip import empty_model, layers_of
from kurtail_pl.surgery.families import REGISTRY, architecture_of
from kurtail_pl.surgery.layout import module_name, stacked

log = logging.getLogger(__name__)

FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
"""Old checkpoints hold the rotary frequencies, which follow from the configuration."""
CACHE_SCALES = re.compile(r"\.self_attn\.([qkv]|prob|[kv]_proj\.output)_scale$")
"""Scales of a runtime's own 8-bit cache; the model itself has none."""
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|input_scale|weight_(packed|shape|g_idx|zero_point|scale\w*)"
    r"|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
)
ADAPTER = re.compile(r"\.(lora_\w+|base_layer)\.")
OTHER_KINDS = (
    (QUANTIZED, "holds quantized weights ({}); give the original float model"),
    (ADAPTER, "holds an adapter ({}); merge it by peft's merge_and_unload, save that"),
)
"""What tensors that the model does not know say of a folder that lacks others."""
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")

Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""What a model can be given: name -> shape, and the weights of our modules that it holds, several if stacked."""


class _Filling:
    """What fills the weights of a model so far.

    Attributes:
        found: stored tensors by their places in the model, in the checkpoint's names.
        unknown: those that the model does not have: name in our modules -> name in the file.
    """

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self.folder, self.shapes = folder, shapes
        self.found: dict[str, Stored] = {}
        self.unknown: dict[str, str] = {}
        self._filled: dict[str, Stored] = {}

    def put(self, place: str, ours: str, tensor: Stored) -> None:
        """Fill with a stored tensor what it holds: one weight, or several that are stacked in it."""
        if ours not in self.shapes:
            self.unknown[ours] = tensor.name
            return
        shape, parts = self.shapes[ours]
        _require_fits(self.folder, tensor, shape)
        for part in parts:
            if part in self._filled:
                before = self._filled[part].name
                raise CheckpointError(f"{self.folder} stores {part} twice, as {before} and {tensor.name}; remove one")
            self._filled[part] = tensor
        self.found[place] = tensor

    def tie(self, one: str, other: str) -> None:
        """Fill one of two weights that the model shares, if the other alone is stored."""
        if one not in self._filled and other in self._filled:
            self.found[one] = self._filled[one] = self._filled[other]

    @property
    def missing(self) -> list[str]:
        """Weights that nothing fills."""
        return [part for _, parts in self.shapes.values() for part in parts if part not in self._filled]


def placed(folder: Path, stored: Mapping[str, Stored], config: PretrainedConfig) -> dict[str, Stored]:
    """Every tensor that a plain model needs, by its name there, and where it is stored.

    transformers' rule: a name may lack the prefix of the base model or have it once too often; a tied embedding and
    head that are both stored are each their own, and of which one is stored is both; what the model does not know is
    left out with a warning. Names within a decoder layer stay the checkpoint's, for `module_state`.

    Args:
        folder: for messages.
        stored: what the files hold.
        config: of the model.

    Raises:
        CheckpointError: naming a tensor that is missing, stored twice, of another shape, or of integers, or one that
            the model's own modules do not have.
        UnsupportedArchitecture: when the family is unknown.
    """
    architecture, shapes = architecture_of(config), _shapes(config)
    filling = _Filling(folder, shapes)
    for name, tensor in stored.items():
        filling.put(*_place(name, architecture, shapes), tensor)
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    if config.tie_word_embeddings:
        filling.tie(head, embedding)
        filling.tie(embedding, head)
    if filling.missing:
        raise _incomplete(folder, filling.missing, filling.unknown, head, config)
    layers = (f"{architecture.layers}.{index}" for index in range(config.num_hidden_layers))
    modules = (architecture.embedding, architecture.final_norm, architecture.head, *layers)
    _judge(folder, filling.unknown, tuple(f"{module}." for module in modules), config)
    return filling.found


def require_held(folder: Path, stored: Mapping[str, Stored], config: PretrainedConfig) -> None:
    """Raise CheckpointError when a configuration asks for more than the files hold; before modules are made for it.

    Every layer has norms as wide as the model, and a mixture's router a row for each expert.
    """
    layers, width = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    record, experts = REGISTRY.get(config.model_type), 1
    if record is not None and record.experts is not None:
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    held = sum(prod(tensor.shape) for tensor in stored.values())
    if layers * width * experts > held:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for {layers} layers {width} wide ({experts} experts), and the files hold "
            f"{held} numbers; put the config.json that belongs to the weights beside them"
        )


def _place(name: str, architecture: Architecture, shapes: Shapes) -> tuple[str, str]:
    """Where a stored tensor belongs, by the checkpoint's names within layers and by our modules'."""
    base, ours = architecture.embedding.partition(".")[0] + ".", module_name(name, architecture)
    if ours.startswith(base) and ours.removeprefix(base) in shapes:
        return name.removeprefix(base), ours.removeprefix(base)
    if base + ours in shapes:
        return base + name, base + ours
    return name, ours


def _shapes(config: PretrainedConfig) -> Shapes:
    # A copy: a model being made sets the attention of the configuration that it is given.
    architecture, model = architecture_of(config), empty_model(copy.deepcopy(config))
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        shapes[name] = tuple(tensor.shape), (name,)
    for index, layer in enumerate(layers_of(model, architecture)):
        prefix = f"{architecture.layers}.{index}."
        for name, (shape, parts) in stacked(layer, architecture).items():
            shapes[prefix + name] = shape, tuple(prefix + part for part in parts)
    return shapes


def _require_fits(folder: Path, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.dtype in INTEGERS:
        raise CheckpointError(
            f"{folder} stores {tensor.name} in {tensor.dtype}, so its weights are quantized already; "
            "give the original float model"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder} stores {tensor.name} as {list(tensor.shape)} and its config.json asks for {list(shape)}; "
            "put the config.json that belongs to the weights beside them"
        )


def _incomplete(
    folder: Path, missing: list[str], unknown: Mapping[str, str], head: str, config: PretrainedConfig
) -> CheckpointError:
    """What to say of tensors that are missing."""
    for pattern, said in OTHER_KINDS:
        if told := next(filter(pattern.search, unknown.values()), None):
            return CheckpointError(f"{folder} {said.format(told)}")
    for name in unknown.values():
        if own := next((own for own in missing if name.endswith(f".{own}")), None):
            return CheckpointError(
                f"{folder} names its tensors with {name.removesuffix(own)!r} before transformers' names, as a wrapper "
                "(compiled, parallel) has them; call save_pretrained on the model within it"
            )
    if missing == [head]:
        kind = ", ".join(config.architectures or []) or "no class"
        return CheckpointError(
            f"{folder} has no {head}, and its config.json ties it to nothing (tie_word_embeddings is false, it names "
            f"{kind}): no language model; give one with a head"
        )
    return CheckpointError(
        f"{folder} has no tensor {first_of(missing)}, which its config.json asks for; add the missing weights, or the "
        "config.json that belongs to these"
    )


def _judge(folder: Path, unknown: Mapping[str, str], within: tuple[str, ...], config: PretrainedConfig) -> None:
    """Refuse what is stored for the model's own modules and would change it; warn of the rest, as transformers does."""
    ignored = []
    for ours, name in sorted(unknown.items()):
        if FREQUENCIES.search(name):
            continue
        if QUANTIZED.search(name):
            raise CheckpointError(f"{folder} holds quantized weights ({name}); give the original float model")
        if ours.startswith(within) and not CACHE_SCALES.search(name):
            raise CheckpointError(
                f"{folder} stores {name}, which a {config.model_type} of its config.json does not have; correct "
                "config.json (biases, model_type), or remove the tensor if it is of no use"
            )
        ignored.append(name)
    if ignored:
        log.warning("%s: left out, the model does not have them: %s", folder, first_of(ignored, 3))
