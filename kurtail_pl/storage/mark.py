"""The mark in `config.json` of a folder that transformers alone would read wrongly.

transformers skips a `quant_method` that it does not know with a warning, and would go on to random weights, or leave
online rotations out. `transformers_weights` names the file that it reads instead of the usual ones: what is no file of
weights it refuses with an error that repeats the value. Type, sizes and all else stay, for tokenizers and people. Once
`kurtail_pl` is imported, transformers knows the `quant_method`, and its quantizer (`artefact.quantizer`) takes
`transformers_weights` away.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from kurtail_pl.errors import ArtefactError
from kurtail_pl.storage.files import write_json

CARD = "kurtail.json"
"""This file makes a folder a KurTail artefact, whose tensors have names of their own and are taken as they are."""
CONFIG = "config.json"
METHOD = "kurtail"
WEIGHTS = "transformers_weights"
MARK = {
    "quantization_config": {"quant_method": METHOD},
    WEIGHTS: "none, transformers alone would read this folder wrongly; import kurtail_pl before, or load it with "
    "kurtail_pl.load",
}


def write_config(folder: Path, config: PretrainedConfig, plain: bool) -> None:
    """Write `config.json`, with the mark unless transformers alone gives the right model."""
    config.save_pretrained(folder)
    if not plain:
        path = folder / CONFIG
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **MARK})


def is_marked(config: object) -> bool:
    """Whether what `config.json` holds has the mark."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def without_mark(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration, changed in place to what it was before the mark."""
    if is_marked(config.to_dict()):
        for key in MARK:
            if hasattr(config, key):
                delattr(config, key)
    return config


def require_card(folder: Path) -> None:
    """Raise ArtefactError when a configuration has the mark and `kurtail.json`, which explains it, is missing."""
    if (folder / CARD).is_file():
        return
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # Whoever reads it for what it says has more to say.
    if is_marked(config):
        raise ArtefactError(
            f"{folder} was fused or quantized by kurtail and has no {CARD}, without which its weights mean something "
            "else; copy the whole folder again"
        )
