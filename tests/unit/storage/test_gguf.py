"""GGUF files: what a converted model computes is what the original does, or the file is refused by name."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from families import WINDOW, fill, rope, sizes
from gguf_files import write_gguf
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kurtail_pl.errors import CheckpointError, UnsupportedArchitecture
from kurtail_pl.storage.gguf_header import read_header
from kurtail_pl.storage.sources import config_of, open_model
from kurtail_pl.storage.statement import origin_of

IDS = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(0))
PLAIN = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}
"""Heads that make up the hidden size, as families want them that do not say how wide a head is."""

pytestmark = pytest.mark.usefixtures("cache")


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    return fill(model).eval().requires_grad_(False)


@torch.no_grad()
def assert_same(model: PreTrainedModel, path: Path) -> PretrainedConfig:
    """The converted model's logits, by transformers, on a text longer than every window and scaled length."""
    converted = AutoModelForCausalLM.from_pretrained(
        open_model(str(path)).folder, dtype=torch.float32, experts_implementation="eager"
    )
    torch.testing.assert_close(converted.eval()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    return converted.config


def phi3(**more: Any) -> Phi3Config:
    scaled = more.pop("rope_parameters", rope("default", partial_rotary_factor=0.5)["rope_parameters"])
    return Phi3Config(
        **sizes(**PLAIN, original_max_position_embeddings=32, resid_pdrop=0.0, **more), rope_parameters=scaled
    )


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**sizes()),
    "llama, tied": lambda: LlamaConfig(**sizes(tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaConfig(**sizes(attention_bias=True, mlp_bias=True)),
    "llama with biases of attention": lambda: LlamaConfig(**sizes(attention_bias=True)),
    "mistral": lambda: MistralConfig(**sizes(sliding_window=None)),
    "phi3": phi3,
    "qwen2": lambda: Qwen2Config(**sizes(**PLAIN)),
    "qwen3": lambda: Qwen3Config(**sizes()),
    "qwen3 with biases": lambda: Qwen3Config(**sizes(attention_bias=True)),
    "gemma3": lambda: Gemma3TextConfig(
        **sizes(num_hidden_layers=7, tie_word_embeddings=True), sliding_window=WINDOW, query_pre_attn_scalar=16
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**sizes(), **EXPERTS),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_the_original(name: str, tmp_path: Path) -> None:
    model = tiny(MODELS[name]())
    assert_same(model, write_gguf(tmp_path / "model.gguf", model))


@pytest.mark.parametrize("stated", [{}, {"general.license": "apache-2.0"}])
def test_the_license_goes_along(stated: dict[str, str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny(MODELS["llama"]()), metadata=stated)
    assert origin_of(open_model(str(path)).folder).get("license") == stated.get("general.license")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantized_tensors_are_the_dequantized_ones(kind: str, tmp_path: Path) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    model = tiny(LlamaConfig(**sizes(hidden_size=96, intermediate_size=64)))
    path = write_gguf(tmp_path / "model.gguf", model, kind=quantization)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), quantization), quantization)
            parameter.copy_(torch.from_numpy(rounded.copy()))
    assert_same(model, path)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("factor", "original", "theta"), [(8.0, 32, 1e4), (32.0, 8192, 5e5), (8.0, 8192, 5e5)])
def test_llama_3s_frequencies_are_its_formulas(factor: float, original: int, theta: float, tmp_path: Path) -> None:
    scaled = LLAMA3 | {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
    model = tiny(LlamaConfig(**sizes(), rope_parameters=scaled | {"rope_theta": theta}))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = theta ** -(torch.arange(0, 16, 2) / 16) / frequencies
    path = write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors.tolist()})
    found = assert_same(model, path).rope_parameters
    assert found["rope_type"] == "llama3"
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](config_of(str(path)), torch.device("cpu"))
    torch.testing.assert_close(again, frequencies, rtol=1e-6, atol=0)


def test_frequencies_of_one_scale_nothing(tmp_path: Path) -> None:
    model = tiny(LlamaConfig(**sizes()))
    path = write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": [1.0] * 8})
    assert assert_same(model, path).rope_parameters["rope_type"] == "default"


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "linear, not said": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "none": ({"rope_type": "default"}, {"type": "none", "factor": 4.0}),
    "factor 0": ({"rope_type": "default"}, {"type": "linear", "factor": 0.0, "original_context_length": 256}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
    ),
    "yarn with betas": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_scaled_positions(name: str, family: type[PretrainedConfig], tmp_path: Path) -> None:
    scaling, said = SCALINGS[name]
    model = tiny(family(**sizes(**PLAIN), rope_parameters={"rope_theta": 1e4, **scaling}))
    metadata = {f"{{arch}}.rope.scaling.{key}": value for key, value in said.items()}
    assert_same(model, write_gguf(tmp_path / "model.gguf", model, metadata))


@pytest.mark.parametrize("length", [20, 60])
def test_long_and_short_factors(length: int, tmp_path: Path) -> None:
    """Texts shorter and longer than the 32 positions that the model started from."""
    short, long = [1.0 + 0.25 * i for i in range(4)], [2.0 + 0.5 * i for i in range(4)]
    scaled = {"rope_theta": 1e4, "rope_type": "longrope", "partial_rotary_factor": 0.5}
    scaled |= {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 32}
    model = tiny(phi3(rope_parameters=scaled))
    attention = math.sqrt(1 + math.log(256 / 32) / math.log(32))
    said = {"{arch}.rope.scaling.attn_factor": attention, "{arch}.rope.scaling.original_context_length": 32}
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = write_gguf(tmp_path / "model.gguf", model, said, tensors)
    assert_same(model, path)
    converted = AutoModelForCausalLM.from_pretrained(open_model(str(path)).folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = (m(IDS[:, :length]).logits for m in (converted, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_window_of_phi3(tmp_path: Path) -> None:
    model = tiny(phi3(sliding_window=8))
    path = write_gguf(tmp_path / "model.gguf", model, {"{arch}.attention.sliding_window": 8})
    assert assert_same(model, path).sliding_window == 8


def llama(path: Path, **more: Any) -> None:
    metadata = {key.replace("llama", "{arch}"): value for key, value in more.items() if not isinstance(value, list)}
    tensors = {key: value for key, value in more.items() if isinstance(value, list)}
    write_gguf(path, tiny(LlamaConfig(**sizes())), metadata, tensors)


UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind of scaling": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is longrope, expected none"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor is 1.5, expected 1.0"),
    "shrunk": ({"llama.rope.scaling.factor": 0.5}, "rope.scaling.factor is 0.5, expected 1 or more"),
    "base": ({"llama.rope.freq_base": 0.0}, "rope.freq_base is 0.0, expected more than 1"),
    "part of a head": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, expected 16"),
    "values": ({"llama.attention.value_length": 8}, "attention.value_length is 8, expected 16"),
    "window": ({"llama.attention.sliding_window": 8}, "says llama.attention.sliding_window, which the conversion does"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "says llama.expert_count and 1 more"),
    "clamp": ({"llama.attention.clamp_kqv": 2.0}, "says llama.attention.clamp_kqv"),
    "scale of logits": ({"llama.logit_scale": 0.5}, "says llama.logit_scale"),
    "something new": ({"llama.attention.temperature": 0.5}, "says llama.attention.temperature"),
    "not causal": ({"llama.attention.causal": False}, "attention.causal is False, expected True"),
    "no number": ({"llama.block_count": "three"}, "block_count is three, expected one number"),
    "none": ({"llama.block_count": 0}, "block_count is 0, expected a number above 0"),
    "too many": ({"llama.block_count": 2**32 - 1}, "block_count is 4294967295, expected a number that 30 tensors"),
    "too wide": ({"llama.attention.key_length": 2**31, "llama.attention.value_length": 2**31}, "dimension_count is 16"),
    "many parts": ({"split.count": 2**32 - 1}, "one of the 4294967295 parts"),
    "a template's name": ({"tokenizer.chat_template.../x": "text"}, "'../x' is not text with a plain name"),
    "a template": ({"tokenizer.chat_template": 7}, "'default' is not text with a plain name"),
    "a key of two lines": ({"llama.rope\nscale": 2.0}, r"says llama.rope scale, which"),
    "missing": ({"llama.context_length": None}, "does not say llama.context_length"),
    "token": ({"tokenizer.ggml.bos_token_id": 300}, "bos_token_id is 300, expected one below 300"),
    "adapter": ({"general.type": "adapter"}, r"holds 'adapter' \(general.type\), no model"),
    "layers": ({"llama.block_count": 4}, r"has no tensor blk.3.attn_k.weight and 8 more; give the file of the whole"),
    "fewer layers": (
        {"llama.block_count": 2},
        r"has a tensor blk.2.attn_k.weight and 8 more that a llama has no place",
    ),
    "shape": (
        {"llama.feed_forward_length": 100},
        r"stores blk.0.ffn_gate.weight as \[172, 48\] .* ask for \[100, 48\]",
    ),
    "other frequencies": (
        {"rope_freqs.weight": [1.0, 2, 3, 4, 5, 6, 7, 8]},
        "rope_freqs.weight, and not by Llama 3.1's",
    ),
    "too few": ({"rope_freqs.weight": [1.0, 8.0]}, "has no 8 positive numbers in rope_freqs.weight"),
    "one of two": ({"rope_factors_long.weight": [1.0] * 8}, "has no 8 positive numbers in rope_factors_short.weight"),
    "a bias too few": ({"blk.0.attn_q.bias": [1.0] * 96}, r"has no tensor blk.0.attn_k.bias and \d+ more"),
    "norms of heads": (
        {"blk.0.attn_q_norm.weight": [1.0] * 16},
        "has a tensor blk.0.attn_q_norm.weight that a llama has",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_would_be_lost_is_refused(name: str, tmp_path: Path) -> None:
    changes, cause = UNREAD[name]
    llama(tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=cause) as error:
        open_model(str(tmp_path / "model.gguf"))
    message = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in message
    assert len(message) < 240
    assert not list((tmp_path / "cache").glob("models/*"))


def test_an_architecture_that_is_not_converted(tmp_path: Path) -> None:
    model = tiny(LlamaConfig(**sizes()))
    path = write_gguf(tmp_path / "model.gguf", model, {"general.architecture": None})
    data = path.read_bytes().replace(b"llama", b"mamba")
    path.write_bytes(data)
    with pytest.raises(UnsupportedArchitecture, match=r"architecture 'mamba'; expected one of llama, phi3, qwen2"):
        open_model(str(path))


@pytest.mark.parametrize("names", [["rope_freqs"], ["rope_factors_long", "rope_factors_short"]])
def test_rotary_factors_that_llama_cpp_does_not_read(names: list[str], tmp_path: Path) -> None:
    model, path = tiny(Qwen2Config(**sizes(**PLAIN))), tmp_path / "model.gguf"
    write_gguf(path, model, tensors={f"{name}.weight": [2.0] * 8 for name in names})
    with pytest.raises(CheckpointError, match=rf"a tensor {names[0]}.weight.* that a qwen2 has no place"):
        open_model(str(path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny(LlamaConfig(**sizes())), without=("blk.1.ffn_down.weight", "blk.1.attn_q.weight"))
    with pytest.raises(CheckpointError, match=r"has no tensor blk.1.attn_q.weight and 1 more"):
        open_model(str(path))


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_part_of_a_split_file_names_the_others(others: int, tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    llama(path, **{"split.count": 3, "split.no": 0})
    for number in range(2, 2 + others):
        (tmp_path / f"m-{number:05d}-of-00003.gguf").touch()
    missing = {0: "m-00002-of-00003.gguf, m-00003-of-00003.gguf is missing", 1: "; m-00003-of-00003.gguf is missing"}
    expected = rf"part 1 of 3 .*{missing.get(others, 'of a model; join them')}.*--merge m-00001-of-00003.gguf"
    with pytest.raises(CheckpointError, match=expected):
        open_model(str(path))


FOREIGN = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\n": "pointer of git-lfs, .*run: git lfs pull",
    b"<!DOCTYPE html>": "web page",
    b"PK\x03\x04" + bytes(100): "zip file",
    b"ggjt" + bytes(100): "format before GGUF",
    b"something else": r"not a GGUF file \(it begins with b'some'\)",
    b"GGUF": "cut off within its header",
    b"GGUF\x01\x00\x00\x00" + bytes(100): "has GGUF version 1",
    b"GGUF\x00\x00\x00\x03" + bytes(100): "big-endian",
    b"GGUF\x03\x00\x00\x00" + b"\xff" * 16: "cut off within its header",
}


@pytest.mark.parametrize(("data", "cause"), FOREIGN.items(), ids=FOREIGN.values())
def test_foreign_files(data: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=cause):
        open_model(str(tmp_path / "model.gguf"))


def test_a_file_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    llama(path)
    whole = path.read_bytes()
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(CheckpointError, match=r"is (empty|cut off).*; copy or download the file again"):
            read_header(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"the file at {len(whole) - 1}"):
        read_header(path)


def test_bytes_changed_in_a_header(tmp_path: Path) -> None:
    """Each ends in a header or in our error; a length that is not there is never waited for."""
    path = tmp_path / "model.gguf"
    llama(path)
    whole, draw = path.read_bytes(), torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        at = int(torch.randint(4, 6000, (), generator=draw))
        damaged[at] = int(torch.randint(256, (), generator=draw))
        path.write_bytes(damaged)
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused < 300


def test_a_suffix_in_capitals(tmp_path: Path) -> None:
    model = tiny(LlamaConfig(**sizes()))
    assert_same(model, write_gguf(tmp_path / "MODEL.GGUF", model))
    with pytest.raises(CheckpointError, match=r"GGUF file .*OTHER.GGUF does not exist"):
        open_model(str(tmp_path / "OTHER.GGUF"))


def test_chat_templates_come_along(tmp_path: Path) -> None:
    one, two = "{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = tiny(LlamaConfig(**sizes()))
    path = write_gguf(tmp_path / "one.gguf", model, {"tokenizer.chat_template": one})
    assert open_model(str(path)).tokenizer().chat_template == one
    named = {"tokenizer.chat_template": one, "tokenizer.chat_template.tool_use": two}
    path = write_gguf(tmp_path / "two.gguf", model, named | {"tokenizer.chat_templates": ["tool_use"]})
    assert open_model(str(path)).tokenizer().chat_template == {"default": one, "tool_use": two}


def test_what_an_earlier_version_converted_is_not_taken_up(cache: Path, tmp_path: Path) -> None:
    model = tiny(LlamaConfig(**sizes()))
    path = write_gguf(tmp_path / "model.gguf", model)
    folder = open_model(str(path)).folder
    old = folder.with_name(folder.name.rpartition("-")[0])
    folder.rename(old)
    assert open_model(str(path)).folder == folder
    assert folder.parent == cache / "models"
