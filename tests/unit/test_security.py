"""What SECURITY.md promises: nothing that a folder names is run, and nothing outside it is read or written."""

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from kurtail_onnx.run.session import open_session
from lightning.pytorch.strategies import SingleDeviceStrategy
from onnx import TensorProto, helper
from transformers import AutoTokenizer

from kurtail_pl.cli.later import RecipeCLI
from kurtail_pl.cli.trainer import command_line
from kurtail_pl.errors import ArtefactError, CheckpointError, NotWritable, RuntimeUnusable
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec
from kurtail_pl.storage import card as ours
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import new_folder, write_json, write_tensors, write_text
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.storage.sources import config_of
from kurtail_pl.storage.weights import INDEX
from kurtail_pl.surgery.equip import empty_model

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
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


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's calls.
def test_a_checkpoint_names_no_class_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(CODE.format(ran=tmp_path / "ran"))
    monkeypatch.syspath_prepend(tmp_path)
    named = {"_class_path": "evil.EvilModel", "rotation_seed": 7, "_instantiator": "evil.make"}
    parts = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "global_step", "epoch", "settings", "stopped")
    torch.save({**dict.fromkeys(parts), "hyper_parameters": named}, tmp_path / "last.ckpt")
    monkeypatch.setattr(sys, "argv", [])

    class Parsed(RecipeCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Parsing is all."""

    arguments = ["fit", "--config", str(RECIPE), "--ckpt_path", str(tmp_path / "last.ckpt")]
    parsed = command_line(Parsed, "kurtail", arguments).config["fit"]
    assert parsed["model"]["class_path"] == "kurtail_pl.lit.KurTailModule"
    assert parsed["model"]["init_args"]["rotation_seed"] == 0
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "last.ckpt")
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    with pytest.raises(pickle.UnpicklingError):
        strategy.load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


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


@pytest.mark.parametrize("place", ["../outside.data", "{outside}", "link.data"])
def test_a_graph_reads_no_file_outside_its_folder(tmp_path: Path, place: str) -> None:
    """What ONNX Runtime does for us: a location outside is refused, and so is a link that leads there."""
    numbers = helper.make_tensor("w", TensorProto.FLOAT, [4], bytes(16), raw=True)
    outputs = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])]
    model = helper.make_model(helper.make_graph([], "graph", [], outputs, [numbers]), ir_version=10)
    folder, outside = tmp_path / "export", tmp_path / "outside.data"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    open_session(folder / "model.onnx", threads=1)
    (folder / "model.onnx.data").rename(outside)
    (folder / "link.data").symlink_to(outside)
    stored = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = place.format(outside=outside)
    (folder / "model.onnx").write_bytes(stored.SerializeToString())
    with pytest.raises(RuntimeUnusable, match="External data path") as error:
        open_session(folder / "model.onnx", threads=1)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "hellaswag", "winogrande"])
def test_rows_of_tasks_are_no_templates(task_rows: Path, tmp_path: Path, name: str) -> None:
    from kurtail_pl.stages.evaluation.tasks.harness import parts_of

    folder = Path(shutil.copytree(task_rows / name, tmp_path / name))
    evil = "{{ ''.__class__ }}{% for a in b %}"
    for file in folder.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        changed = [{k: evil if isinstance(v, str) and len(v) > 1 else v for k, v in row.items()} for row in rows]
        file.write_text("\n".join(map(json.dumps, changed)))
    asked = parts_of(name, TaskSpec((name,), str(tmp_path)))[0].requests()
    assert all("__class__" in "".join(map(str, request.args)) for request in asked)


def test_a_card_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    (tmp_path / "outside").write_text("")
    source = {"model": "tiny", "sha256": "0"}
    ours.write_card(folder, {"method": "test", "scheme": FLOAT.to_dict(), "source": source, "cost": {}})
    edit(folder / ours.CARD, sha256={"../outside": "0"})
    with pytest.raises(ArtefactError, match="not in its folder"):
        ours.require_intact(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "a/../../outside.safetensors", f"{'x' * 300}.safetensors"]
)
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


@pytest.mark.parametrize("make", ["new", "resumable"])
def test_a_folder_is_not_made_through_a_link(tmp_path: Path, make: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    if make == "new":
        with new_folder(tmp_path / "out", overwrite=False) as partial:
            (partial / "file").write_text("")
    else:
        with resumable_folder(tmp_path / "out", False, {"a": 1}) as work:
            (work.folder / "file").write_text("")
            work.finished(1)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["kept"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert not (tmp_path / "out").is_symlink()


def test_a_lock_that_stands_as_a_link_is_not_written_through(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / ".out.lock").symlink_to(kept)
    with contextlib.suppress(NotWritable), alone_with(tmp_path / "out"):
        pass
    assert kept.read_text() == "mine"
