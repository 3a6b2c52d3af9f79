"""What decides the output of a stage: the key by which it is reused, taken up again, or compared.

| stage | its key |
| --- | --- |
| capture | the model, tokenizer, text, windows, rows, seed, dtype, kind of the values |
| learning | what the store was made from, batches, settings of the method, its optimizer and when it stops |
| fuse | the model, files that are copied along, rotations, texts and settings of scales and signs, versions |
| quantize | the fused folder, every setting, text, dtype |
| evaluate | the model, tokens, dtype |
| tasks | the model, tokenizer, settings, rows by their hashes, version of the harness |

*The model* is, of a plain folder, its weights and configuration; of an artefact its scheme, clips, rotations, and
every file that its card lists. Left out is what decides nothing: how a path is spelled, where a folder lies, the
device, the number of threads and processes, and what the work cost. Texts count by their content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.storage.card import is_ours, read_card, rotations_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of, sha256_of_text
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import hash_of
from kurtail_pl.surgery.rotations import Rotations

DECISIVE = ("format", "method", "scheme", "clips")
"""These entries of a card decide, beside the files, what its artefact computes."""
SPELLED = ("source", "folder")
"""Settings that name a file or folder: the hash of what is in it stands beside them in a key."""
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""Files that fusion and quantization copy along."""


def settings_key(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain data for JSON, methods by their kinds, without names of files and folders."""
    data = settings.to_dict() if hasattr(settings, "to_dict") else asdict(settings)
    key: dict[str, Any] = json.loads(json.dumps(unspelled(data)))
    return key


def unspelled(value: Any) -> Any:
    """Plain data without the names of files and folders."""
    if isinstance(value, Mapping):
        return {name: unspelled(item) for name, item in value.items() if name not in SPELLED}
    return value


def model_key(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model computes, plain or made by KurTail."""
    if not is_ours(checkpoint.folder):
        return {"model_sha256": checkpoint.sha256}
    return {"model_sha256": checkpoint.sha256, "folder_sha256": folder_sha256(checkpoint.folder)}


def folder_sha256(folder: Path) -> str:
    """Hash of what an artefact computes; equal for two that were made alike at different costs.

    The card's hashes of the files are believed: who reads the files compares them.
    """
    card = read_card(folder)
    files = {name: value for name, value in card["sha256"].items() if name != ROTATIONS}
    decisive = {name: card.get(name) for name in DECISIVE}
    rotations = hash_of(rotations_of(folder))
    return sha256_of_text(json.dumps([decisive, files, rotations], sort_keys=True))


def require_learned_on(rotations: Rotations, model_sha256: str, place: Path) -> None:
    """Raise ConfigError when rotations say that they were learned on another model than the one of that hash.

    Args:
        rotations: any; random ones were learned on none.
        model_sha256: of the model that they are to be used with.
        place: the model's folder, or its store, for the message.
    """
    data = rotations.origin.get("data", {})
    learned_on = data.get("activations", data).get("model_sha256")
    if learned_on not in (None, model_sha256):
        raise ConfigError(
            f"the rotations were learned on another model than that of {place} (its hash begins with "
            f"{model_sha256[:12]}, theirs with {learned_on[:12]}); learn them on this one, or name the other"
        )


def companions_sha256(checkpoint: Checkpoint) -> str:
    """Hash of the files that are copied along with new weights."""
    paths = sorted({path for pattern in COMPANIONS for path in checkpoint.folder.glob(pattern)})
    return sha256_of_text("".join(f"{path.name} {sha256_of(path)}\n" for path in paths))


def tokens_sha256(tokens: Tensor) -> str:
    """Hash of windows of tokens ``[windows, tokens]``, their shape included."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()
