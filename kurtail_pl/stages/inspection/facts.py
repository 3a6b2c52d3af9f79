"""What a folder or file says of itself: how its numbers are stored, and what has to be done at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kurtail_pl.errors import ArtefactError, CheckpointError, shortened
from kurtail_pl.methods.target import NUMBERS
from kurtail_pl.stages.export import DESCRIPTION
from kurtail_pl.storage.card import is_ours, read_card, rotations_of, scheme_of
from kurtail_pl.storage.gguf_header import AGAIN, read_header
from kurtail_pl.storage.model_config import CONFIG
from kurtail_pl.storage.records import read_object
from kurtail_pl.surgery.allowances import sentence
from kurtail_pl.surgery.families import REFUSED, REGISTRY

Kind = Literal["artefact", "onnx", "gguf", "compressed-tensors", "plain"]
FLOAT = "float"
ONLINE_KEY = "kurtail.online"
"""Of a GGUF file that was written although its weights expect rotations at run time; it names them."""
ROTATED = ("prism.hadamard.version", ONLINE_KEY)
"""Keys of GGUF files whose weights expect rotated inputs."""
FUSED = ("weight_input", "weight_output")
"""Places of a transform of compressed-tensors that were multiplied into the weights."""
CACHE = ("q_attn", "k_cache")
"""Those of R3, which turns queries and keys alike."""


@dataclass(frozen=True)
class Facts:
    """A file or folder.

    Args:
        kind: of file.
        weights: how those of linears are stored, in words.
        activations: how the inputs of linears are rounded, in words; ``float`` for not at all.
        cache: the same of keys and values.
        online: rotations that have to act at run time, in words.
        own: what only KurTail's own model computes.
        family: how the rotations of the model's family are made, in words; None where it has no record.
        turned_cache: whether a rotation of queries and keys is asked for, without which scores stay what they are.
    """

    kind: Kind
    weights: str
    activations: str = FLOAT
    cache: str = FLOAT
    online: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    turned_cache: bool = False
    family: str | None = None


def facts_of(path: Path) -> Facts:
    """Read what says of itself a KurTail folder, an export, a GGUF file, or a model in the Hugging Face layout.

    Raises:
        ArtefactError: when a KurTail folder is damaged.
        CheckpointError: when the path does not exist or is nothing of these, or its file is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give an artefact, an export, a model's folder or a GGUF file")
    if path.is_file():
        return _of_file(path)
    if is_ours(path):
        return _of_artefact(path)
    if (path / DESCRIPTION).is_file() and (path / "model.onnx").is_file():
        return _of_graph(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _of_gguf(files[0])
    if files:
        raise CheckpointError(f"{path} has {len(files)} GGUF files; name one, such as {files[0]}")
    if (path / CONFIG).is_file():
        return _of_checkpoint(path)
    raise CheckpointError(f"{path} holds no model; give an artefact, an export, a model's folder or a GGUF file")


def _of_file(path: Path) -> Facts:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path} is no GGUF file; give the folder that it is in, or a file that ends in .gguf")
    return _of_gguf(path)


def _of_artefact(folder: Path) -> Facts:
    scheme, rotations, card = scheme_of(folder), rotations_of(folder), read_card(folder)
    own = {
        "centres": scheme.centre,
        "static scales": scheme.static,
        "a prefix": scheme.prefix is not None,
        "a clip of its own at each site": bool(card.get("clips")),
        "a learned map before each quantizer": bool(card.get("transforms")),
    }
    beside = [] if scheme.side is None else [scheme.side.sentence()]
    return Facts(
        kind="artefact",
        weights=FLOAT if scheme.weights is None else scheme.weights.sentence(),
        activations=FLOAT if scheme.activations is None else str(scheme.activations),
        cache=FLOAT if scheme.cache is None else scheme.cache.sentence(),
        online=(
            *(["R1 of each block input"] if rotations.block_input is not None else []),
            *(NUMBERS[name] for name in rotations.online),
        ),
        family=_family(folder),
        own=(*(name for name, there in own.items() if there), *beside),
    )


def _family(folder: Path) -> str | None:
    """How the rotations of a folder's family are made, in words."""
    path = folder / CONFIG
    kind = read_object(path, CheckpointError, AGAIN).get("model_type") if path.is_file() else None
    if not isinstance(kind, str):
        return None
    if kind in REFUSED:
        return f"a {kind} cannot be rotated exactly: {REFUSED[kind]}"
    return sentence(REGISTRY[kind]) if kind in REGISTRY else None


def _of_graph(folder: Path) -> Facts:
    quantizers = read_object(folder / DESCRIPTION, CheckpointError, AGAIN).get("quantizers")
    words = {name: _integers(value) for name, value in quantizers.items()} if isinstance(quantizers, Mapping) else {}
    weights, head = words.get("weights", FLOAT), words.get("head", FLOAT)
    return Facts(
        kind="onnx",
        weights=weights if head == FLOAT else f"{weights}; head: {head}",
        activations=words.get("activations", FLOAT),
        cache=words.get("values", FLOAT),
    )


def _integers(quantizer: Any) -> str:
    """A quantizer of an export's description in words."""
    if not isinstance(quantizer, Mapping):
        return FLOAT
    group = quantizer.get("group_size")
    return f"{quantizer.get('bits')}-bit integers" + (f", in groups of {group}" if group else "")


def _of_gguf(path: Path) -> Facts:
    header = read_header(path)
    kinds = Counter(
        tensor.kind.name
        for tensor in header.tensors.values()
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    )
    rotated = [key for key in ROTATED if key in header.metadata]
    return Facts(
        kind="gguf",
        weights=", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or FLOAT,
        online=tuple(rotated),
    )


def _of_checkpoint(folder: Path) -> Facts:
    quantization = read_object(folder / CONFIG, CheckpointError, AGAIN).get("quantization_config")
    if quantization is None:
        return Facts(kind="plain", weights=FLOAT, family=_family(folder))
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method == "kurtail":
        raise ArtefactError(f"{folder} is an artefact without its card, kurtail.json; copy it again")
    if method != "compressed-tensors":
        raise CheckpointError(
            f"{folder} was quantized by {shortened(repr(method), 40)}, whose files are not read here; inspect takes "
            "those of kurtail, GGUF, compressed-tensors, and plain ones"
        )
    return _of_compressed(quantization)


def _of_compressed(quantization: Mapping[str, Any]) -> Facts:
    groups = _settings(quantization, "config_groups")
    weights = {_arguments(group.get("weights")) for group in groups}
    activations = {_arguments(group.get("input_activations")) for group in groups}
    places = {
        apply.get("location")
        for group in _settings(quantization.get("transform_config") or {}, "config_groups")
        for apply in group.get("apply", [])
    }
    turned = places & set(CACHE)
    online = sorted(f"the {place} of linears" for place in places - set(FUSED) - turned)
    return Facts(
        kind="compressed-tensors",
        weights=" and ".join(sorted(weights)) or FLOAT,
        activations=" and ".join(sorted(activations)) or FLOAT,
        cache=_arguments(quantization.get("kv_cache_scheme")),
        online=tuple(online),
        turned_cache=bool(turned),
    )


def _settings(settings: Any, name: str) -> list[Mapping[str, Any]]:
    found = settings.get(name) if isinstance(settings, Mapping) else None
    return [each for each in found.values() if isinstance(each, Mapping)] if isinstance(found, Mapping) else []


def _arguments(arguments: Any) -> str:
    """Quantization arguments of compressed-tensors in words."""
    if not isinstance(arguments, Mapping):
        return FLOAT
    kind = {"int": "integers", "float": "floating point"}.get(str(arguments.get("type")), "codes")
    group = arguments.get("group_size")
    shared = f"in groups of {group}" if group and group > 0 else f"per {arguments.get('strategy')}"
    return f"{arguments.get('num_bits')}-bit {kind}, {shared}"
