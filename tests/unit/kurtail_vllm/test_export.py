"""The folder: its layout against numpy's own reading, and its model against the artefact's in transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from folders import with_tensors
from kurtail_vllm.exporter import VLLM
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import Uniform
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
MIXTURES = ("mixtral", "qwen3_moe", "glm4_moe", "minimax_m2", "olmoe")
REFUSED = {
    "gpt_oss": "reads the experts of a gpt_oss stacked",
    "gemma3": "a gemma3_text has norms of what its blocks write",
    "glm4": "a glm4 has norms of what its blocks write",
}
DENSE = [family for family in FAMILIES if family not in (*MIXTURES, *REFUSED)]


def described(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def unpacked(words: torch.Tensor, bits: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Codes of int32 words ``[rows, words]``, from the lowest bits up, ``[rows, count]``."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")
    values = stream.reshape(len(words), -1, bits) << np.arange(bits, dtype=np.uint8)
    codes: np.ndarray[Any, np.dtype[np.uint8]] = values.sum(-1, dtype=np.uint8)[:, :count]
    return codes


@pytest.mark.parametrize(
    ("weights", "offset"),
    [(Uniform(4), 8), (Uniform(8, group_size=16), 128), (Uniform(4, False, group_size=16), 0), (Uniform(8, False), 0)],
    ids=str,
)
def test_codes_scales_and_zero_points_are_the_artefacts(
    llama: Path, make_artefact: MakeArtefact, tmp_path: Path, weights: Uniform, offset: int
) -> None:
    artefact = make_artefact(llama, weights=weights)
    folder = export(artefact, tmp_path / "vllm", VLLM(), check=False)
    stored, source = load_file(folder / "model.safetensors"), Source(artefact)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        linear = source.linear(name)
        for part in ("codes", "scale", "zero_point"):
            if hasattr(linear, part):
                setattr(linear, part, source.tensor(f"{name}.{part}"))
        codes, (scale, zero_point) = linear.quantized()
        assert stored[f"{name}.weight_shape"].tolist() == [linear.out_features, linear.in_features]
        packed = unpacked(stored[f"{name}.weight_packed"], weights.bits, linear.in_features)
        assert np.array_equal(packed.astype(int) - offset, codes.int().numpy())
        assert stored[f"{name}.weight_scale"].dtype == torch.float16
        assert torch.equal(stored[f"{name}.weight_scale"].float(), scale)
        assert (f"{name}.weight_zero_point" in stored) == (zero_point is not None)
        if zero_point is not None:
            points = unpacked(stored[f"{name}.weight_zero_point"].T.contiguous(), weights.bits, linear.out_features)
            assert np.array_equal(points.T, zero_point.int().numpy())
    checks = described(export(artefact, tmp_path / "checked", VLLM()), "checks.json")
    assert ("transformers" in checks) == weights.symmetric
    readme = (tmp_path / "checked" / "README.md").read_text()
    assert ("dequantize=True" in readme) == (not weights.symmetric)


def test_the_folder_is_one_that_anybody_reads(fused_only: Path, tmp_path: Path) -> None:
    folder = export(fused_only, tmp_path / "vllm", VLLM())
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("kurtail_export.json", "checks.json", "README.md"),
        *({"generation_config.json"} & {path.name for path in fused_only.iterdir()}),
    }
    config = AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings is False
    assert config.dtype == torch.float16
    assert "kurtail" not in (folder / "config.json").read_text()
    quantization = described(folder, "config.json")["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head"]
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert "transform_config" not in quantization
    readme = (folder / "README.md").read_text()
    assert "vllm serve FOLDER --dtype float16\n" in readme
    assert "transformers and SGLang read this folder too" in readme
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(fused_only).get_vocab()
    floats = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "proj" not in name}
    assert {tensor.dtype for tensor in floats.values()} == {torch.float16}


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE)
def test_transformers_gives_the_artefacts_logits_and_tokens(
    family: str, make_model: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    """Biases, tied heads, fused projections, sliding windows: float32 holds the artefact's every number."""
    artefact = make_artefact(make_model(family), halved=False, weights=Uniform(4, group_size=4))
    folder = export(artefact, tmp_path / "vllm", VLLM("float32"))
    assert described(folder, "checks.json")["transformers"]["logits_error"] < 1e-5
    ids = torch.arange(40).unsqueeze(0) * 7 % 300
    ours = kurtail_pl.load(artefact)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, found = ours(ids).logits, theirs(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    wanted, given = (
        model.generate(ids[:, :5], max_new_tokens=12, min_new_tokens=12, do_sample=False) for model in (ours, theirs)
    )
    assert torch.equal(wanted, given)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_vllm_computes_otherwise_are_refused(
    family: str, make_model: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(make_model(family), weights=Uniform(4, group_size=4))
    with pytest.raises(ConfigError, match=rf"{REFUSED[family]}.*use the artefact with"):
        export(artefact, tmp_path / "vllm", VLLM())


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_have_the_names_of_checkpoints(
    family: str, make_model: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(make_model(family), weights=Uniform(4, group_size=4))
    folder = export(artefact, tmp_path / "vllm", VLLM())
    checks = described(folder, "checks.json")
    assert checks["mirror"]["logits_error"] < 1e-12
    assert "transformers" not in checks
    names = set(load_file(folder / "model.safetensors"))
    block, expert = {
        "mixtral": ("block_sparse_moe", "3.w2"),
        "qwen3_moe": ("mlp", "5.down_proj"),
        "glm4_moe": ("mlp", "7.down_proj"),
        "minimax_m2": ("block_sparse_moe", "3.w2"),
        "olmoe": ("mlp", "3.down_proj"),
    }[family]
    assert ("model.layers.2.mlp.shared_experts.up_proj.weight_packed" in names) == (family == "glm4_moe")
    assert f"model.layers.2.{block}.experts.{expert}.weight_packed" in names
    assert f"model.layers.2.{block}.gate.weight" in names
    ignored = described(folder, "config.json")["quantization_config"]["ignore"]
    assert ignored == ["lm_head", rf"re:.*{block}\.gate$"]


def test_layers_of_other_bits_are_groups_by_name(llama: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(llama, layer_bits=[4, 8, 4])
    folder = export(artefact, tmp_path / "vllm", VLLM())
    groups = described(folder, "config.json")["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    assert groups["group_1"]["targets"] == [
        f"model.layers.1.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert described(folder, "checks.json")["transformers"]["tokens"] == 12


def test_the_same_bytes_again(fused_only: Path, tmp_path: Path) -> None:
    one, other = (export(fused_only, tmp_path / name, VLLM(), check=False) for name in ("one", "other"))
    for path in one.iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_that_would_be_rounded_are_refused(
    llama: Path, make_artefact: MakeArtefact, tmp_path: Path, dtype: Any
) -> None:
    artefact = make_artefact(llama, halved=False)
    with pytest.raises(ConfigError, match=rf"q_proj\.scale would be rounded in {dtype}.*--to.dtype float32"):
        export(artefact, tmp_path / "vllm", VLLM(dtype))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_as_good_where_it_holds_the_scales(
    llama: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    def shorter(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().float() if name.endswith(".scale") else tensor

    folder = export(with_tensors(make_artefact(llama), shorter), tmp_path / "vllm", VLLM("bfloat16"))
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert described(folder, "checks.json")["transformers"]["tokens"] == 12


def test_values_beyond_float16_are_refused(llama: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    def larger(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() * 1e5 if name == "lm_head.weight" else tensor

    artefact = with_tensors(make_artefact(llama), larger)
    with pytest.raises(ConfigError, match=r"lm_head\.weight has values up to .*, which float16 does not hold"):
        export(artefact, tmp_path / "vllm", VLLM())
    assert list(tmp_path.iterdir()) == []
