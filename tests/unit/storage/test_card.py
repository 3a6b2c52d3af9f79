"""Folders of ours: rotations bit for bit, the card and its hashes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.storage import card as ours
from kurtail_pl.storage.rotation_file import FILE, read_rotations, write_rotations
from kurtail_pl.surgery.rotations import Rotations, random_rotations

NAMES = ("residual", "value", "query_key", "attention_output", "mlp_hidden")


@pytest.fixture
def rotations(tiny: Path) -> Rotations:
    return random_rotations(AutoConfig.from_pretrained(tiny), 7)


@pytest.mark.parametrize("kept", [NAMES, (), *[(name,) for name in NAMES], ("residual", "mlp_hidden")])
def test_rotations_come_back_bit_for_bit(rotations: Rotations, tmp_path: Path, kept: tuple[str, ...]) -> None:
    origin = {"seed": 7, "settings": {"lr": 0.1, "name": "größer"}, "cost": None}
    write_rotations(tmp_path / FILE, Rotations(**{name: getattr(rotations, name) for name in kept}, origin=origin))
    read = read_rotations(tmp_path / FILE)
    assert read.origin == origin
    for name in NAMES:
        value, expected = getattr(read, name), getattr(rotations, name) if name in kept else None
        if expected is None:
            assert value is None
        elif name in ("residual", "value"):
            assert value.dtype == torch.float64
            assert torch.equal(value, expected)
        else:
            assert torch.equal(value.left, expected.left)
            assert torch.equal(value.right, expected.right)
            assert value.construction == expected.construction


def test_equal_rotations_give_equal_files(rotations: Rotations, tmp_path: Path) -> None:
    """The file's hash goes into `kurtail.json` as what identifies the rotations."""
    for number in range(8):
        write_rotations(tmp_path / f"{number}", rotations)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def card_with(scheme: Scheme) -> dict[str, Any]:
    source = {"model": "tiny", "sha256": "0" * 64}
    return {"method": "test", "scheme": scheme.to_dict(), "source": source, "cost": {}}


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.bin").write_bytes(bytes(range(100)))
    ours.write_card(tmp_path, card_with(FLOAT))
    return tmp_path


def test_a_card_written_again_does_not_vouch_for_itself(carded: Path) -> None:
    """As after a kill between the card and the folder's name: it would be called damaged."""
    before = ours.read_card(carded)
    ours.write_card(carded, {key: value for key, value in before.items() if key not in ("format", "sha256")})
    assert ours.read_card(carded) == before
    ours.require_intact(carded)


def test_a_card_that_was_half_written_is_not_vouched_for(carded: Path) -> None:
    """A process killed before it gave the card its name left it beside under another, and the next takes that away."""
    (carded / f".{ours.CARD}.partial").write_text("{")
    ours.write_card(carded, card_with(FLOAT))
    ours.require_intact(carded)


def test_card_round_trip(carded: Path) -> None:
    card = ours.read_card(carded)
    assert card["method"] == "test"
    assert card["format"] == 3
    assert set(card["sha256"]) == {"a.txt", "b.bin"}
    ours.require_intact(carded)
    (carded / "results.json").write_text("{}")  # written later, and no part of the model
    ours.require_intact(carded)


@pytest.mark.parametrize(("name", "word"), [("a.txt", "damaged"), ("b.bin", "damaged"), ("b.bin", "missing")])
def test_changed_or_missing_files(carded: Path, name: str, word: str) -> None:
    path = carded / name
    if word == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtefactError, match=rf"{name} is {word}"):
        ours.require_intact(carded)


def test_missing_damaged_or_foreign_card(carded: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="none does not exist; name one that kurtail fit"):
        ours.read_card(tmp_path / "none")
    (carded / ours.CARD).write_text("{")
    with pytest.raises(ArtefactError, match=r"kurtail.json is not JSON"):
        ours.read_card(carded)
    (carded / ours.CARD).write_text('{"format": 7}')
    with pytest.raises(ArtefactError, match="format 7, expected 3"):
        ours.read_card(carded)


def uniform(**settings: Any) -> dict[str, Any]:
    return {"kind": "Uniform", "settings": settings}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": []}, r"scheme is \[\]: Input should be an object"),
        ({"scheme": {"weights": uniform(bits=99)}}, "scheme.weights .* bits is 99; a quantizer has 2 to 8 bits"),
        (
            {"scheme": {"weights": uniform(bits="4")}},
            "scheme.weights .*Uniform.bits is '4': Input should be a valid int",
        ),
        ({"scheme": {"weights": {"kind": "os.system"}}}, "'os.system' is no format of this version"),
        ({"scheme": {"activations": {"bits": "4"}}}, "scheme.activations.bits is '4': Input should be a valid integer"),
        ({"scheme": {"colour": 1}}, "scheme.colour is 1: Unexpected"),
        ({"scheme": {"prefix": ["a"]}}, "scheme.prefix.0 is 'a': Input should be a valid integer"),
        ({"clips": [{"self_attn.keys": "x"}]}, "clips.0.self_attn.keys is 'x'"),
        ({"transforms": [{"keys": "x"}]}, "transforms.0.keys is 'x'"),
        ({"sha256": {"../../.bashrc": "0"}}, "names the file '../../.bashrc', which is not in its folder"),
        ({"sha256": {"/etc/passwd": "0"}}, "names the file '/etc/passwd'"),
        ({"sha256": {"a\\..\\b": "0"}}, "which is not in its folder"),
    ],
)
def test_cards_that_cannot_be_used(carded: Path, change: dict[str, Any], message: str) -> None:
    card = json.loads((carded / ours.CARD).read_text())
    (carded / ours.CARD).write_text(json.dumps(card | change))
    with pytest.raises(ArtefactError, match=message) as error:
        ours.read_card(carded)
    assert len(str(error.value).splitlines()) == 1


def test_a_plain_folder_is_float_and_not_rotated(tiny: Path) -> None:
    assert not ours.is_ours(tiny)
    assert ours.scheme_of(tiny) == FLOAT
    assert ours.rotations_of(tiny) == Rotations()


def test_scheme_and_rotations_of_our_folder(tmp_path: Path, rotations: Rotations) -> None:
    write_rotations(tmp_path / FILE, rotations)
    ours.write_card(tmp_path, card_with(Scheme()))
    assert ours.is_ours(tmp_path)
    assert ours.scheme_of(tmp_path) == Scheme()
    assert torch.equal(ours.rotations_of(tmp_path).residual, rotations.residual)  # type: ignore[arg-type]
