"""What SECURITY.md promises: nothing that a folder names is run, and nothing outside it is read or written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kurtail_pl.errors import ArtefactError, CheckpointError
from kurtail_pl.storage import folder as ours
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import write_json, write_tensors, write_text
from kurtail_pl.storage.sources import config_of
from kurtail_pl.storage.weights import INDEX
from kurtail_pl.surgery.equip import empty_model
from kurtail_pl.surgery.scheme import FLOAT

CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()
Path("{ran}").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class EvilConfig(LlamaConfig):
    model_type = "evil"


class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig


class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def ran(model: Path, tmp_path: Path) -> Path:
    """The file that the model's own code makes when it is run."""
    (model / "evil.py").write_text(CODE.format(ran=tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_configuration_is_not_run(model: Path, ran: Path, model_type: str) -> None:
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    edit(model / "config.json", model_type=model_type, architectures=["EvilModel"], auto_map=named)
    if model_type == "evil":
        for read in (lambda: Checkpoint(model).config, lambda: config_of(str(model))):
            with pytest.raises(CheckpointError):
                read()
    else:
        assert type(empty_model(Checkpoint(model).config)).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_code_of_a_tokenizer_is_not_run(model: Path, ran: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    edit(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    with pytest.raises(CheckpointError):
        Checkpoint(model).tokenizer()
    assert not ran.exists()


def test_a_chat_template_is_rendered_in_a_sandbox_alone(model: Path, ran: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (model / "chat_template.jinja").write_text(template)
    tokenizer = Checkpoint(model).tokenizer()
    assert tokenizer("a king")["input_ids"]  # Nothing of ours renders it;
    assert tokenizer.chat_template == template
    with pytest.raises(Exception, match="unsafe"):  # a user who does is in transformers' sandbox.
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert not ran.exists()


def test_a_tokenizer_reads_no_file_outside_its_folder(model: Path, stories: Path) -> None:
    own = Checkpoint(model).tokenizer()
    outside = {"tokenizer_file": str(stories / "tokenizer.json"), "vocab_file": str(stories / "tokenizer.json")}
    edit(model / "tokenizer_config.json", **outside)
    assert Checkpoint(model).tokenizer().get_vocab() == own.get_vocab()
    assert AutoTokenizer.from_pretrained(stories).get_vocab() != own.get_vocab()


def test_a_name_that_stands_as_a_link_is_replaced_not_written_through(tmp_path: Path) -> None:
    """Neither at the place of a file nor at its temporary name, which someone else may know."""
    kept = tmp_path / "kept"
    kept.write_text("mine")
    folder = tmp_path / "artefact"
    folder.mkdir()
    for write, content in ((write_json, {}), (write_text, ""), (write_tensors, {})):
        for name in ("file", ".file.partial"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(kept)
        write(folder / "file", content)
        assert kept.read_text() == "mine"
        assert not (folder / "file").is_symlink()


def test_a_card_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    (tmp_path / "outside").write_text("")
    source = {"model": "tiny", "sha256": "0"}
    ours.write_card(folder, {"method": "test", "scheme": FLOAT.to_dict(), "source": source, "cost": {}})
    edit(folder / ours.CARD, sha256={"../outside": "0"})
    with pytest.raises(ArtefactError, match="not in its folder"):
        ours.require_intact(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{outside}", "a/../../outside.safetensors"])
def test_an_index_reads_no_file_outside_its_folder(tied: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / index["weight_map"][first], outside)
    index["weight_map"][first] = name.format(outside=outside)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not in its folder"):
        Checkpoint(folder)
