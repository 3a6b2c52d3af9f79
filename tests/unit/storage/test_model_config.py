"""Configurations, generation settings and tokenizers that cannot be used: the file, the key, its value, what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config

from kurtail_pl.errors import CheckpointError, KurtailError
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.model_config import read_config, read_generation_config
from kurtail_pl.storage.sources import config_of
from kurtail_pl.surgery.equip import empty_model

FACTORS = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
WRONG = [
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a whole number from 1 to"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected a whole number from 1 to"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"intermediate_size": -4}, "intermediate_size is -4"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4, expected a divisor of the 6 num_attention_heads"),
    ({"head_dim": None, "hidden_size": 50}, r"cannot be used \(The hidden size \(50\) is not a multiple of"),
    ({"head_dim": 15}, "cannot be used .RoPE requires an even rotary dimension"),
    ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu', expected an activation of transformers"),
    ({"pad_token_id": 300}, "pad_token_id is 300, expected a token below the vocab_size 300, or null"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
    ({"other": {"deep": float("inf")}}, "other.deep is inf, expected a finite number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"model_type": ...}, "config.json has no model_type"),
    ({"model_type": "x" * 5000}, "config.json cannot be used"),
    ({"dtype": "float99"}, "config.json"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_type is 'su', expected one of default, linear"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2}}, "factor is -2"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
    (
        {"rope_parameters": {**FACTORS, "short_factor": [1], "long_factor": [1]}},
        r"short_factor is \[1\], expected 8 pos",
    ),
    ({"rope_parameters": {**FACTORS, "short_factor": [1] * 8, "long_factor": [0] * 8}}, r"long_factor is \[0, 0"),
]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def require_short(error: pytest.ExceptionInfo[KurtailError], folder: Path) -> None:
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value).replace(str(folder), "")) <= 250


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(values)[:50] for values, _ in WRONG])
def test_values_that_cannot_be(copy: Path, values: dict[str, Any], message: str) -> None:
    change(copy / "config.json", **values)
    for read in (lambda: Checkpoint(copy).config, lambda: config_of(str(copy))):
        with pytest.raises(CheckpointError, match=rf"config\.json.*{message}|{message}") as error:
            read()
        require_short(error, copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", r"holds \[\], expected a JSON object"),
        (b'{"model_type": ', "is not JSON"),
        (b'{"a":' * 5000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_files_that_are_no_configuration(copy: Path, content: bytes, message: str) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}") as error:
        read_config(copy)
    require_short(error, copy)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pad_token_id": None},
        {"pad_token_id": -1},
        {"head_dim": ..., "hidden_size": 96},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {**FACTORS, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
    ],
    ids=str,
)
def test_what_transformers_can_use_is_taken(copy: Path, values: dict[str, Any]) -> None:
    change(copy / "config.json", **values)
    config = read_config(copy)
    assert config.to_dict() == AutoConfig.from_pretrained(copy).to_dict()
    empty_model(config)


def test_what_a_class_of_transformers_refuses_is_one_line(copy: Path) -> None:
    config = read_config(copy)
    config.hidden_act = "swiglu"
    with pytest.raises(CheckpointError, match=r"the config.json of .*model makes no model \(KeyError: .*; correct it"):
        empty_model(config)


def test_windows_that_the_models_class_does_not_read_are_none(copy: Path) -> None:
    """transformers' Llama attends to all tokens whatever its config.json says of windows."""
    change(copy / "config.json", sliding_window=4, layer_types=["sliding_attention"] * 4)
    config = read_config(copy)
    assert not hasattr(config, "sliding_window")
    assert not hasattr(config, "layer_types")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window": -1}, "sliding_window is -1, expected a whole number from 1 to"),
        ({"sliding_window": "x"}, "sliding_window is 'x'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
            "sliding_window is None, expected a number",
        ),
    ],
)
def test_windows_that_cannot_be(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    Qwen2Config(num_hidden_layers=2, use_sliding_window=True).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **values)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ['{"temperature": 0.7,', "[]", "", '{"max_new_tokens": "many", "num_beams": []}'])
def test_generation_settings_that_cannot_be_read(copy: Path, content: str) -> None:
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json .*; correct it, .*, or remove it") as error:
        read_generation_config(copy)
    require_short(error, copy)


def test_no_generation_settings(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    assert read_generation_config(copy) is None


# --- tokenizers


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_tokenizer_files_that_cannot_be_read(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} .*; copy it again from") as error:
        Checkpoint(copy).tokenizer()
    require_short(error, copy)


def test_values_that_tokenizers_look_at_late(copy: Path) -> None:
    change(copy / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be used"):
        Checkpoint(copy).tokenizer()


@pytest.mark.parametrize("key", ["model", "added_tokens", "version", "pre_tokenizer"])
def test_tokenizers_with_parts_of_other_kinds(copy: Path, key: str) -> None:
    change(copy / "tokenizer.json", **{key: 5})
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be used \(.*\); copy it again") as error:
        Checkpoint(copy).tokenizer()
    require_short(error, copy)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(copy: Path) -> None:
    change(copy / "config.json", vocab_size=299)
    with pytest.raises(CheckpointError, match=r"has 300 tokens, more than the vocab_size 299 of its config\.json"):
        Checkpoint(copy).tokenizer()


def test_tokens_added_to_a_tokenizer_later_may_be_beyond(copy: Path, cache: Path) -> None:
    """As for a padding token that training added and nobody resized the model for."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copy)
    assert len(Checkpoint(copy).tokenizer()) == 301
    text = copy / "text.txt"
    text.write_text("a king and a queen " * 30)
    perplexity(Checkpoint(copy), TextSpec(str(text), 2, 16))
    text.write_text("a king and a queen [PAD] " * 30)
    with pytest.raises(CheckpointError, match=r"the text has token 300 and the model in .* has 300; give"):
        perplexity(Checkpoint(copy), TextSpec(str(text), 2, 16))
