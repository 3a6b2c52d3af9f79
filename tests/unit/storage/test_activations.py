"""The activation store: written and read rows, origins, damage, size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kurtail_pl.errors import NotFinite, StoreMismatch
from kurtail_pl.storage import activations
from kurtail_pl.storage.activations import ActivationStore, Origin, Shape, SiteWriter

SHAPE = Shape(layers=2, hidden_size=12, kv_heads=2, head_dim=5)
ORIGIN = Origin("tiny", "m" * 64, "t" * 64, "tales.txt", "x" * 64, windows=3, seqlen=9, rows=20, seed=4)
SITES = ["layer000.attn_in", "layer000.ffn_in", "layer001.attn_in", "layer001.ffn_in"]
VALUES = ["layer000.value", "layer001.value"]


def rows_of(site: str) -> Tensor:
    width = 10 if site.endswith("value") else 12
    return torch.randn(20, width, generator=torch.Generator().manual_seed(len(site) + int(site[7])))


def write_site(folder: Path, site: str) -> None:
    """In two parts, neither of them a block."""
    rows = rows_of(site).to(torch.bfloat16)
    with SiteWriter(folder, site, *rows.shape) as writer:
        for places in torch.randperm(20, generator=torch.Generator().manual_seed(1)).split(13):
            writer.write(places, rows[places])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for site in SITES + VALUES:
        write_site(tmp_path, site)
    activations.write_manifest(tmp_path, ORIGIN, SHAPE, {"torch": "2"})
    return tmp_path


def test_sites_in_the_models_order() -> None:
    assert activations.block_sites(2) == SITES
    assert activations.value_sites(2) == VALUES
    assert activations.block_sites(12)[-1] == "layer011.ffn_in"
    assert [SHAPE.width(site) for site in (SITES[0], SITES[1], VALUES[0])] == [12, 12, 10]


def test_round_trip_in_bfloat16(folder: Path) -> None:
    store = ActivationStore(folder)
    assert store.origin == ORIGIN
    assert store.shape == SHAPE
    for site in SITES + VALUES:
        expected = rows_of(site).to(torch.bfloat16).float()
        for start, stop in ((0, 20), (3, 11), (19, 20), (5, 5)):
            block = store.read(site, start, stop)
            assert block.dtype == torch.float32
            assert torch.equal(block, expected[start:stop])
    store.require_intact()
    store.require_origin(ORIGIN)


def test_a_site_is_the_file_that_safetensors_writes(folder: Path, tmp_path: Path) -> None:
    for site in (SITES[0], VALUES[1]):
        save_file({"rows": rows_of(site).to(torch.bfloat16)}, tmp_path / "whole", {"format": "pt"})
        assert (folder / f"{site}.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_bytes_are_those_of_the_tensors_on_disk(folder: Path) -> None:
    payload = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            payload += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a dict
    assert activations.store_bytes(SHAPE, 20) == payload == 2 * 20 * (4 * 12 + 2 * 10)


HASHES = {"model_sha256": "n" * 64, "tokenizer_sha256": "u" * 64, "text_sha256": "y" * 64}
NUMBERS = {
    "windows": 4,
    "seqlen": 8,
    "rows": 21,
    "seed": 5,
}


@pytest.mark.parametrize("key", NUMBERS)
def test_each_difference_is_named(folder: Path, key: str) -> None:
    wanted = replace(ORIGIN, **{key: NUMBERS[key]})
    with pytest.raises(StoreMismatch) as error:
        ActivationStore(folder).require_origin(wanted)
    message = str(error.value)
    assert f"{key} is {getattr(ORIGIN, key)!r}, wanted {NUMBERS[key]!r}" in message
    assert str(folder) in message
    assert message.count("wanted") == 1


@pytest.mark.parametrize("key", HASHES)
def test_of_a_hash_only_its_subject_is_named(folder: Path, key: str) -> None:
    with pytest.raises(StoreMismatch, match=f"something else: another {key.removesuffix('_sha256')};"):
        ActivationStore(folder).require_origin(replace(ORIGIN, **{key: HASHES[key]}))


def test_the_names_of_model_and_text_are_no_difference(folder: Path) -> None:
    ActivationStore(folder).require_origin(replace(ORIGIN, model="./model/", text="/elsewhere/text"))


def test_all_differences_are_named_at_once(folder: Path) -> None:
    with pytest.raises(StoreMismatch) as error:
        ActivationStore(folder).require_origin(replace(ORIGIN, **HASHES, **NUMBERS))  # type: ignore[arg-type]
    assert (str(error.value).count("wanted"), str(error.value).count("another ")) == (4, 4)  # one names the folder


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match=r"is not an activation store.*run kurtail capture"):
        ActivationStore(tmp_path / "none")
    write_site(tmp_path, SITES[0])
    with pytest.raises(StoreMismatch, match="is not an activation store"):
        ActivationStore(tmp_path)  # sites without a manifest


def test_damaged_or_foreign_manifest(folder: Path) -> None:
    manifest = folder / activations.MANIFEST
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(StoreMismatch, match=r"manifest.json is not JSON"):
        ActivationStore(folder)
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(StoreMismatch, match="format 99, expected 1"):
        ActivationStore(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("origin", {"rows": "12"}, r"origin.rows is '12': Input should be a valid integer"),
        ("origin", {"colour": "red"}, r"origin.colour is 'red'"),
        ("shape", {"layers": 10**12}, "lists other sites than a store of 1000000000000 layers has"),
        ("sha256", {"../../outside": "0"}, "lists other sites"),
    ],
)
def test_manifests_that_cannot_be_used(folder: Path, part: str, change: dict[str, Any], message: str) -> None:
    manifest = folder / activations.MANIFEST
    content = json.loads(manifest.read_text())
    content[part] |= change
    manifest.write_text(json.dumps(content))
    with pytest.raises(StoreMismatch, match=message):
        ActivationStore(folder)


def test_rows_of_another_number_or_type_are_refused(folder: Path) -> None:
    store = ActivationStore(folder)
    path = folder / f"{SITES[2]}.safetensors"
    for rows in (torch.zeros(1, 1, dtype=torch.bfloat16), load_file(path)["rows"].float()):
        save_file({"rows": rows}, path)
        with pytest.raises(StoreMismatch, match="holds other rows than the manifest beside it says"):
            store.read(SITES[2], 0, 1)


@pytest.mark.parametrize("damage", ["byte", "gone"])
def test_damaged_site(folder: Path, damage: str) -> None:
    store, path = ActivationStore(folder), folder / f"{SITES[2]}.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    with pytest.raises(StoreMismatch, match=rf"{path.name} is missing or damaged"):
        store.require_intact()


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_unreadable_site(folder: Path, damage: str) -> None:
    store, path = ActivationStore(folder), folder / f"{SITES[2]}.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreMismatch, match=rf"{SITES[2]}.*cannot be read"):
        store.read(SITES[2], 0, 4)
    assert store.read(SITES[1], 0, 4).shape == (4, 12)


def test_rows_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    """3.4e38 is a float32; bfloat16 ends at 3.39e38 and rounds it to infinity."""
    rows = torch.full((2, 4), 3.4e38)
    assert rows.isfinite().all()
    with (
        SiteWriter(tmp_path, "layer000.value", 2, 4) as writer,
        pytest.raises(NotFinite, match=r"rows of .*layer000\.value"),
    ):
        writer.write(torch.arange(2), rows.bfloat16())
