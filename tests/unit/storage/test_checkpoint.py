"""Model folders read tensor by tensor against transformers; what is missing or damaged; hashes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kurtail_pl.errors import CheckpointError
from kurtail_pl.storage.checkpoint import Checkpoint, to_float
from kurtail_pl.storage.weights import INDEX, SINGLE


@pytest.fixture
def copy(tied: Path, tmp_path: Path) -> Path:
    """A sharded folder to damage."""
    return shutil.copytree(tied, tmp_path / "copy")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("which", ["tiny", "tied", "stories"])
def test_tensors_are_those_of_transformers(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    checkpoint = Checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert set(checkpoint.names) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(checkpoint.tensor(name), parameter)
    assert checkpoint.config.to_dict() == model.config.to_dict()
    layer = checkpoint.tensors_under("model.layers.1")
    assert set(layer) == set(model.model.layers[1].state_dict())
    assert torch.equal(layer["mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


def test_one_file_or_shards(tiny: Path, tied: Path) -> None:
    assert Checkpoint(tiny).files == [tiny / SINGLE]
    assert len(shards(tied)) > 4
    assert Checkpoint(tied).files == shards(tied)
    for folder in (tiny, tied):
        assert Checkpoint(folder).size == sum(path.stat().st_size for path in shards(folder))


def test_a_prefix_is_a_whole_name(tiny: Path) -> None:
    # Not model.layers.10 and the like, and not half a name.
    assert Checkpoint(tiny).tensors_under("model.layer") == {}
    assert set(Checkpoint(tiny).tensors_under("model.norm")) == {"weight"}


def test_tokenizer(tiny: Path) -> None:
    text = "The old king found a dragon."
    assert Checkpoint(tiny).tokenizer()(text)["input_ids"] == AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]


def test_a_tokenizer_is_read_again_where_a_file_of_it_is_another(copy: Path, tied: Path) -> None:
    read = Checkpoint(tied).tokenizer()
    assert Checkpoint(copy).tokenizer() is read
    changes = (
        ("tokenizer.json", '"content": "<pad>"', '"content": "<gap>"'),
        ("tokenizer_config.json", "<pad>", "<s>"),
    )
    for name, old, new in changes:
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
        again, expected = Checkpoint(copy).tokenizer(), AutoTokenizer.from_pretrained(copy)
        assert again is not read
        assert (again.get_vocab(), again.pad_token) == (expected.get_vocab(), expected.pad_token)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no-such-model does not exist"):
        Checkpoint(tmp_path / "no-such-model")


def test_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{copy.name} has no config.json"):
        Checkpoint(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{copy.name} has no {SINGLE}; .* is a shard without its index; add {INDEX}"
    ):
        Checkpoint(copy)


def test_missing_shard(copy: Path) -> None:
    victim = shards(copy)[3]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name} is missing"):
        Checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_damaged_shard(copy: Path, keep: int) -> None:
    victim = shards(copy)[2]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=rf"{victim.name} is damaged or cut off .*copy or download that file again"
    ):
        _ = Checkpoint(copy).names


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', ""])
def test_damaged_index(copy: Path, text: str) -> None:
    (copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(copy)


def test_damaged_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json"):
        _ = Checkpoint(copy).config


def test_unknown_tensor(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.9.x'"):
        Checkpoint(tiny).tensor("model.layers.9.x")


def test_missing_tokenizer(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"{copy.name} has no tokenizer; add its tokenizer.json"):
        Checkpoint(copy).tokenizer()


def test_hash_is_that_of_the_content(copy: Path, tied: Path) -> None:
    before = Checkpoint(tied).sha256
    assert Checkpoint(copy).sha256 == before
    victim = shards(copy)[-1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert Checkpoint(copy).sha256 != before
    data[-1] ^= 1
    victim.write_bytes(data)
    assert Checkpoint(copy).sha256 == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert Checkpoint(copy).sha256 != before


def test_tokenizer_hash_is_that_of_what_it_does(copy: Path, tied: Path) -> None:
    before = Checkpoint(tied).tokenizer_sha256()
    assert Checkpoint(copy).tokenizer_sha256() == before
    path = copy / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"].pop()
    path.write_text(json.dumps(data))
    assert Checkpoint(copy).tokenizer_sha256() != before


def test_floats_are_cast_and_codes_stay() -> None:
    assert to_float(torch.ones(2, dtype=torch.float16), torch.float32).dtype == torch.float32
    for dtype in (torch.uint8, torch.int8):
        assert to_float(torch.ones(2, dtype=dtype), torch.float32).dtype == dtype
