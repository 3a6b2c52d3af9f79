"""A file that is not the artefact's does not pass: wrong bytes, wrong metadata, another tokenizer, no file at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from kurtail_gguf.exporter import GGUF
from kurtail_gguf.verify import check as checking
from kurtail_gguf.verify.check import check

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]


@pytest.fixture(scope="module")
def artefact(make_artefact: MakeArtefact) -> Path:
    return make_artefact("llama3")


@pytest.fixture
def folder(artefact: Path, tmp_path: Path) -> Path:
    """An export of one's own, to be changed."""
    return export(artefact, tmp_path / "gguf", GGUF(), check=False)


def change(folder: Path, what: Callable[[GGUFReader], None]) -> None:
    reader = GGUFReader(folder / "model.gguf", "r+")
    what(reader)
    reader.data.flush()


def tensor(reader: GGUFReader, name: str) -> Any:
    return next(tensor for tensor in reader.tensors if tensor.name == name)


@pytest.mark.parametrize(
    "name", ["blk.2.ffn_down.weight", "blk.0.attn_k.bias", "blk.1.ffn_norm.weight", "output_norm.weight"]
)
def test_another_number(name: str, artefact: Path, folder: Path) -> None:
    def one_bit(reader: GGUFReader) -> None:
        data = tensor(reader, name).data
        data.view("u1").reshape(-1)[3] ^= 16

    change(folder, one_bit)
    with pytest.raises(CheckFailed, match=f"{name} of the file is not what the artefact holds"):
        check(Source(artefact), folder)


def test_an_embedding_that_is_rounded_too_much(artefact: Path, folder: Path) -> None:
    def last_places(reader: GGUFReader) -> None:
        tensor(reader, "token_embd.weight").data.view("u2").reshape(-1)[5] ^= 4

    change(folder, last_places)
    with pytest.raises(
        CheckFailed, match=r"token_embd\.weight of the file is further from the artefact than F16 rounds"
    ):
        check(Source(artefact), folder)


def test_a_file_that_is_cut_off(artefact: Path, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckFailed, match=r"does not read model\.gguf"):
        check(Source(artefact), folder)


def test_other_metadata_is_found_by_running(artefact: Path, folder: Path) -> None:
    pytest.importorskip("xllamacpp")

    def base(reader: GGUFReader) -> None:
        field = reader.fields["llama.rope.freq_base"]
        field.parts[field.data[0]][0] = 500.0

    change(folder, base)
    with pytest.raises(CheckFailed, match="logarithms of probabilities"):
        check(Source(artefact), folder)


def test_another_tokenizer_is_found_by_running(artefact: Path, folder: Path) -> None:
    pytest.importorskip("xllamacpp")

    def letters(reader: GGUFReader) -> None:
        """Two tokens change places."""
        field = reader.fields["tokenizer.ggml.tokens"]
        places = {bytes(field.parts[number]): field.parts[number] for number in field.data}
        places[b"e"][0], places[b"t"][0] = ord("t"), ord("e")

    change(folder, letters)
    with pytest.raises(CheckFailed, match=r"makes the tokens .* and the artefact's tokenizer"):
        check(Source(artefact), folder)


def test_what_llama_cpp_does_not_load(artefact: Path, folder: Path) -> None:
    pytest.importorskip("xllamacpp")

    def layers(reader: GGUFReader) -> None:
        field = reader.fields["llama.block_count"]
        field.parts[field.data[0]][0] = 4

    change(folder, layers)
    with pytest.raises(CheckFailed, match=r"llama\.cpp \(xllamacpp .*does not load model\.gguf"):
        check(Source(artefact), folder)


def test_without_llama_cpp_the_file_is_compared_alone(
    artefact: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "import_runtime", lambda: None)
    found = check(Source(artefact), folder)
    assert found["llama.cpp"] is None
    assert found["equal_weights"] == 7 * 3
    assert "llama.cpp was not run" in " ".join(GGUF().notes(_description(folder), found))


def test_an_export_may_be_made_anew(artefact: Path, folder: Path) -> None:
    before = (folder / "model.gguf").read_bytes()
    shutil.rmtree(folder)
    export(artefact, folder, GGUF(), check=False)
    assert (folder / "model.gguf").read_bytes() == before


def _description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "kurtail_export.json").read_text())
    return found
