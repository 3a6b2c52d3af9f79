"""A check finds what is not the artefact's, whatever part of the folder it is in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kurtail_vllm.exporter import VLLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.stages.export import export

DOWN = "model.layers.1.mlp.down_proj"
MATRIX = "model.layers.0.mlp.down_proj.mlp_hidden_input.weight"
Tensors = dict[str, Tensor]


def flip_a_code(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight_packed"][3, 5] ^= 1


def move_a_scale(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight_scale"][2] *= 1.01


def move_a_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"][0] += 0.01


def lose_a_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.2.input_layernorm.weight"]


def add_a_tensor(tensors: Tensors) -> None:
    tensors[f"{DOWN}.bias"] = torch.ones(128, dtype=torch.float16)


def transpose_the_matrix(tensors: Tensors) -> None:
    tensors[MATRIX] = tensors[MATRIX].T.contiguous()


def halve_the_matrix(tensors: Tensors) -> None:
    tensors[MATRIX] /= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_code, rf"codes of {DOWN} in the export"),
        (move_a_scale, rf"scale of {DOWN} in the export"),
        (move_a_norm, r"model\.norm\.weight of the export is not"),
        (lose_a_tensor, r"no tensor model\.layers\.2\.input_layernorm\.weight"),
        (add_a_tensor, rf"tensors that the artefact has not: {DOWN}\.bias"),
        (transpose_the_matrix, "the logits of what vLLM computes"),
        (halve_the_matrix, "the logits of what vLLM computes"),
    ],
)
def test_other_tensors(online: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    folder = export(online, tmp_path / "vllm", VLLM(), check=False)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed, match=message):
        VLLM().check(Source(online), folder)


def other_bits(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def other_inputs(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["input_activations"]["num_bits"] = 8


def no_inputs(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["input_activations"] = None


def no_transforms(config: dict[str, Any]) -> None:
    config["transform_config"]["config_groups"].pop("mlp_hidden")


def no_target(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]


def unknown_key(config: dict[str, Any]) -> None:
    config["transform_config"]["config_groups"]["mlp_hidden"]["seed"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_bits, "of model.layers.0.self_attn.q_proj in the export"),
        (other_inputs, "the logits of what vLLM computes"),
        (no_inputs, "the logits of what vLLM computes"),
        (no_transforms, "tensors that the artefact has not"),
        (no_target, "does not say how model.layers.0.self_attn.q_proj is quantized"),
        (unknown_key, "compressed-tensors refuses the config.json"),
    ],
)
def test_other_settings(online: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    folder = export(online, tmp_path / "vllm", VLLM(), check=False)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match=message):
        VLLM().check(Source(online), folder)


def test_transformers_with_other_weights(fused_only: Path, tmp_path: Path) -> None:
    """What it reads of the configuration alone, and the tensors do not show."""
    folder = export(fused_only, tmp_path / "vllm", VLLM(), check=False)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match=r"transformers' model of .* gives other"):
        VLLM().check(Source(fused_only), folder)
