"""The files of an export that vLLM loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kurtail_pl.artefact.shards import ShardWriter
from kurtail_pl.artefact.source import Source
from kurtail_pl.stages.fusion.stage import copy_companions
from kurtail_pl.storage.files import require_space, write_json
from kurtail_vllm.describe import describe
from kurtail_vllm.groups import quantization_config
from kurtail_vllm.settings import Settings
from kurtail_vllm.tensors import parts
from kurtail_vllm.transforms import transform_config, transform_tensors, transforms_of

CONFIG = "config.json"


def write(source: Source, spec: Settings, folder: Path) -> dict[str, Any]:
    """Write weights, configuration and tokenizer; one decoder layer is in memory at a time.

    Args:
        source: the artefact.
        spec: type of the floats, and whether linears quantize what they read.
        folder: where the files go.

    Returns:
        How the folder is run, and what is quantized at run time.
    """
    transforms = transforms_of(source)
    added = sum(transform.bytes(spec.torch_dtype) for transform in transforms)
    # The weights, and the parts that they are joined from.
    require_space(folder, 2 * (source.checkpoint.size + added))
    with TemporaryDirectory(dir=folder) as scratch:
        shards = ShardWriter(folder, Path(scratch), parts=len(source.layers) + 2)
        for number, tensors in enumerate(parts(source, spec.torch_dtype)):
            # vLLM has one matrix for all layers, wherever it was read.
            extra = transform_tensors(source, transforms, spec.torch_dtype) if number == 1 else {}
            shards.write(number, tensors | extra)
        shards.close()
    _write_config(source, spec, folder)
    copy_companions(source.checkpoint, folder)
    return describe(source, spec, transforms)


def _write_config(source: Source, spec: Settings, folder: Path) -> None:
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings, config.dtype = False, spec.torch_dtype
    config.save_pretrained(folder)
    quantization = quantization_config(source, spec.activations)
    if transforms := transforms_of(source):
        quantization["transform_config"] = transform_config(transforms)
    path = folder / CONFIG
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": quantization})
