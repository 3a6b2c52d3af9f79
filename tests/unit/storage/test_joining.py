"""Files joined byte by byte, against safetensors itself and the hub's own way to split."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from kurtail_pl.storage import joining
from kurtail_pl.storage.joining import join, pieces_of

TYPES = (torch.float32, torch.uint8, torch.float16, torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.int8)


def tensors(count: int) -> dict[str, Tensor]:
    """Of all types and odd sizes, an empty one and a single number among them."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 7), (5,), (), (0, 4), (1, 1, 9), (33,)]
    return {
        f"layer.{n}.größe": torch.randint(0, 2, shapes[n % 6], generator=draw).to(TYPES[n % 8]) for n in range(count)
    }


def write_parts(folder: Path, state: dict[str, Tensor], each: int) -> list[Path]:
    names, paths = list(state), []
    for start in range(0, len(names), each):
        paths.append(folder / f"part-{start:05d}.safetensors")
        save_file({name: state[name] for name in names[start : start + each]}, paths[-1], metadata={"format": "pt"})
    return paths


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(("count", "each"), [(1, 1), (48, 1), (48, 5), (48, 48)])
def test_one_file_holds_all(count: int, each: int, tmp_path: Path) -> None:
    state = tensors(count)
    join(write_parts(tmp_path, state, each), tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}
    assert same(load_file(tmp_path / "model.safetensors"), state)
    for piece in pieces_of(tmp_path / "model.safetensors"):
        assert piece.start % max(1, piece.itemsize) == 0


def test_the_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    """Of one type, in the order of the parts; it sorts by name."""
    state = {f"{n:02d}": torch.full((n + 1, 3), float(n)) for n in range(20)}
    join(write_parts(tmp_path, state, 3), tmp_path)
    save_file(state, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("largest", [300, 500, 1000])
def test_files_are_filled_and_named_as_on_the_hub(largest: int, tmp_path: Path) -> None:
    # The hub's function leaves empty tensors aside, and counts storages.
    state = {name: tensor for name, tensor in tensors(48).items() if tensor.numel()}
    parts = write_parts(tmp_path, state, 1)
    join(parts, tmp_path, largest)
    hub = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    assert {path.name for path in tmp_path.glob("model*.safetensors")} == set(hub.filename_to_tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"] == hub.tensor_to_filename
    for name, names in hub.filename_to_tensors.items():
        assert same(load_file(tmp_path / name), {each: state[each] for each in names})


def test_a_tensor_that_is_larger_has_a_file_of_its_own(tmp_path: Path) -> None:
    state = {str(number): torch.ones(number + 1) for number in range(6)}
    join(write_parts(tmp_path, state, 2), tmp_path, 11)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [list(load_file(path)) for path in files] == [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]]


def test_a_large_part_stays_a_file_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "WHOLE", 100)
    monkeypatch.setattr(joining, "LARGEST", 300)
    sizes = {"a": 10, "b": 25, "c": 30, "d": 5, "e": 6, "f": 100}  # Of float32: the last part is larger than a file.
    state = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    parts = write_parts(tmp_path, state, 1)
    join(parts, tmp_path, 300)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [list(load_file(path)) for path in files] == [["a"], ["b"], ["c"], ["d", "e"], ["f"]]
    # Whatever is one part, as a and f come to be, needs no copy.
    assert [path.stat().st_nlink for path in files] == [2, 2, 2, 1, 2]
    assert all(same(load_file(path), {n: state[n] for n in load_file(path)}) for path in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert joining.room_for(4 * size for size in sizes.values()) == 4 * (2 * (10 + 5 + 6 + 100) + 25 + 30)
    before = {path.name: path.read_bytes() for path in files}
    join(parts, tmp_path, 300)
    assert {path.name: path.read_bytes() for path in files} == before


def test_where_a_file_has_one_name_a_part_that_stays_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "WHOLE", 8)

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    state = tensors(2)
    join(write_parts(tmp_path, state, 1), tmp_path, 100)
    found = [load_file(path) for path in sorted(tmp_path.glob("model-*.safetensors"))]
    assert len(found) == 2
    assert same({name: tensor for each in found for name, tensor in each.items()}, state)


def test_again_after_a_kill_it_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_parts(tmp_path, tensors(48), 5)
    folders = [tmp_path / name for name in ("alone", "killed")]
    for folder in folders:
        folder.mkdir()
    join(parts, folders[0], 300)
    copied, chunks = 0, joining._chunks

    class Killed(BaseException):
        pass

    def until_killed(piece: joining.Piece) -> object:
        nonlocal copied
        copied += 1
        if copied == 30:
            raise Killed
        return chunks(piece)

    monkeypatch.setattr(joining, "_chunks", until_killed)
    with pytest.raises(Killed):
        join(parts, folders[1], 300)
    finished = {path.name for path in folders[1].iterdir()}
    assert finished < {path.name for path in folders[0].iterdir()}
    assert finished
    join(parts, folders[1], 300)
    ones, others = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert ones == others


def test_it_holds_no_tensor_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "CHUNK", 1 << 16)
    state = {str(number): torch.full((1 << 20,), number) for number in range(4)}
    parts = write_parts(tmp_path, state, 1)
    tracemalloc.start()
    join(parts, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert same(load_file(tmp_path / "model.safetensors"), state)
